"""Strict reading of a YAML configuration: one mapping, no repeated key, no object tags, no alias bombs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peelcli.config.setting import short_repr
from peelcli.errors import UsageError
from peelcli.runtime.small_files import read_bounded

_LARGEST = 2**17  # bytes
_DEEPEST = 16  # levels of nesting; a configuration has three
_MOST_VALUES = 10_000  # with what aliases repeat
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # no file name and no text of a user's holds them


def load_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError if it is unreadable, no mapping, or repeats a key."""
    import yaml  # 15 ms that only a run with a config file pays

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            for key in (key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key!r} stands twice", node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    try:
        data = read_bounded(path, _LARGEST)
        _check_events(yaml.parse(data, Loader=Strict))
        content = yaml.load(data, Loader=Strict)  # a SafeLoader
    except OSError as error:
        raise UsageError(
            f"{path}: the configuration cannot be read: {error.strerror}; check -c/--config"
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # PyYAML lets errors of Python's own out where a tag and its value disagree.
        detail = " ".join(str(error).split())
        raise UsageError(
            f"{path}: the configuration is not valid YAML: {detail}; correct the file"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(
            f"{path}: expected sections such as 'fit:' with settings under them, found "
            f"{short_repr(content)}; see sample_configs for examples"
        )
    return content


def _check_events(events: Any) -> None:
    """Raise ValueError if a file is nested deeply, holds very many values, or text that no setting accepts.

    An alias counts for all that it repeats, since a few lines of aliases to aliases are worth terabytes.
    """
    import yaml

    sizes: dict[str, int] = {}  # by anchor, how many values it names
    opened: list[
        tuple[str | None, int]
    ] = []  # anchor of each collection we are in, and the count at its start
    count = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} repeats what it stands in, or nothing")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if _NO_TEXT.search(event.value):
                raise ValueError(f"{short_repr(event.value)} holds characters that are none of a text's")
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            count += 1
            opened.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, start = opened.pop()
            if anchor:
                sizes[anchor] = count - start + 1
        if len(opened) > _DEEPEST or count > _MOST_VALUES:
            raise ValueError(
                f"it is nested deeper than {_DEEPEST} levels, or holds more than {_MOST_VALUES:,} values"
            )
