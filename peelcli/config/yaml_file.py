"""Strict reading of a YAML configuration: one mapping, no key twice, no tags that build objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peelcli.config.setting import short_repr
from peelcli.errors import UsageError


def load_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping of a YAML file; UsageError where it is unreadable, no mapping, or names a key twice."""
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
        content = yaml.load(Path(path).read_bytes(), Loader=Strict)  # a SafeLoader
    except OSError as error:
        raise UsageError(
            f"{path}: the configuration cannot be read: {error.strerror}; check -c/--config"
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
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
