"""One setting: its declaration on a dataclass field, and the conversion of text or a YAML value.

Everything that is known about a setting (its sentence of help, its short flag, its choices and bounds) stands
in the metadata of its field, so that YAML, the environment, the command line and the help all read it there.
"""

from __future__ import annotations

import math
import os.path
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from reprlib import Repr
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

# A YAML alias bomb must not blow up the message that rejects it.
_short = Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring = 2, 3, 3, 60
short_repr = _short.repr

COUNTABLE = (
    2**31
)  # a whole number without a bound of its own is below this: nothing that is counted comes near
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Setting:
    """One field of a section, with the rules for its values. `kind` is bool, int, float, str or Path."""

    help: str
    short: str = ""  # short flag, such as "-o"
    metavar: str = ""  # what the help calls the value; made from the kind where empty
    choices: tuple[str, ...] = ()
    pattern: str = ""  # what a text must match in full, and…
    expects: str = ""  # …how to say that in words
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    unset: str = ""  # the word that stands for None, such as "auto"
    alone: str = ""  # a choice that excludes all others
    joined: bool = False  # a YAML list is the same as its items joined by commas
    shared: bool = (
        False  # a flag or variable of this name goes to every section that has it, not to the last only
    )
    split: tuple[
        tuple[str, int], ...
    ] = ()  # the settings that this total is shared out to, and their weights
    key: str = ""  # its key in YAML, where that is not its name
    name: str = ""  # from here on filled in by `settings_of`
    kind: type = str
    optional: bool = False
    many: bool = False
    default: Any = None

    @property
    def flag(self) -> str:
        """The long flag, such as `--seq-len`."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable, such as `PEEL_SEQ_LEN`."""
        return "PEEL_" + self.name.upper()

    @property
    def default_text(self) -> str:
        """The default as it is written on the command line."""
        if self.default in (None, ()):
            return self.unset
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        return ", ".join(map(str, self.default)) if self.many else str(self.default)

    def from_text(self, text: str) -> Any:
        """The value of an environment variable's `text`. Raises ValueError that says what was expected."""
        if not self.many:
            return self._one(text, text=True)
        # A path may hold commas, so paths are parted as PATH is; names are parted by commas.
        return self._several(text.split(os.pathsep) if self.kind is Path else [text], text=True)

    def from_flag(self, value: Any) -> Any:
        """The value of a flag, as text or typed, or a sequence if it is repeatable. Raises ValueError."""
        if self.many:
            return self._several(value if isinstance(value, (list, tuple)) else [value], text=True)
        return self._one(value, text=True)

    def from_value(self, value: Any) -> Any:
        """The value of a YAML entry, which has a type of its own. Raises ValueError."""
        if value is None:
            if self.optional:
                return None
            raise ValueError("has no value; give one or take the key out")
        if self.many:
            return self._several(value if isinstance(value, (list, tuple)) else [value], text=False)
        if self.joined and isinstance(value, (list, tuple)):
            value = ",".join(str(self._one(item, text=False)) for item in value)
        return self._one(value, text=False)

    def _several(self, items: Any, *, text: bool) -> tuple[Any, ...]:
        if self.kind is not Path:
            items = [part for item in items for part in _parts(item)]
        values = tuple(dict.fromkeys(self._one(item, text=text) for item in items))
        if not values and self.default:
            raise ValueError("is an empty list; name at least one")
        if self.alone in values and len(values) > 1:
            raise ValueError(f"{self.alone!r} cannot stand beside others")
        return values

    def _one(self, value: Any, *, text: bool) -> Any:
        # A path may be called "auto", so "-" stands for "none given" there.
        if self.optional and value == ("-" if self.kind is Path else self.unset or None):
            return None
        if self.kind is bool:
            return _as_bool(value, text=text)
        if self.kind in (int, float):
            return self._bounded(_as_int(value, text=text) if self.kind is int else _as_float(value))
        if self.joined and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, (str, Path)):
            raise ValueError(f"{short_repr(value)} is not text")
        if not str(value).strip():
            raise ValueError("is empty")
        if self.kind is Path:
            return Path(os.path.expanduser(value))
        return self._known(str(value))

    def _known(self, value: str) -> str:
        if self.choices and value not in self.choices:
            raise ValueError(
                f"{short_repr(value)} is not one of {', '.join(self.choices)}{hint(value, self.choices)}"
            )
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise ValueError(f"{short_repr(value)} is not {self.expects}")
        return value

    def _bounded(self, value: float) -> float:
        if self.at_least is not None and value < self.at_least:
            raise ValueError(f"{short_repr(value)} is too small; it must be at least {self.at_least:g}")
        if self.above is not None and value <= self.above:
            raise ValueError(f"{short_repr(value)} is too small; it must be above {self.above:g}")
        below = COUNTABLE if self.below is None and self.kind is int else self.below
        if below is not None and value >= below:
            raise ValueError(f"{short_repr(value)} is too large; it must be below {below:g}")
        return value


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field that is a setting: its default, its help text, and the rules of `Setting`."""
    return field(default=default, metadata={"setting": Setting(help, **rules)})


@cache
def settings_of(section: type) -> MappingProxyType[str, Setting]:
    """The settings of a section by name, in the order of its fields."""
    hints = get_type_hints(section)
    found = {}
    for item in fields(section):
        inner = [kind for kind in get_args(hints[item.name]) if kind is not type(None)]
        many = get_origin(hints[item.name]) is tuple
        found[item.name] = replace(
            item.metadata["setting"],
            name=item.name,
            key=item.metadata["setting"].key or item.name,
            kind=inner[0] if inner else hints[item.name],
            optional=type(None) in get_args(hints[item.name]),
            many=many,
            default=None if item.default is MISSING else item.default,
        )
    return MappingProxyType(found)


def hint(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'ternary'?` if one of the `known` words is similar to `word`, else ""."""
    from difflib import get_close_matches  # only ever needed on the way out

    by_lower = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def _parts(item: Any) -> list[Any]:
    """The items of a text, separated by commas outside brackets; a list of whole numbers is such a bracket."""
    if isinstance(item, (list, tuple)) and all(type(n) is int for n in item):
        return [str(list(item))]
    return [part.strip() for part in re.split(r",(?![^\[]*\])", item)] if isinstance(item, str) else [item]


def _as_bool(value: Any, *, text: bool) -> bool:
    if isinstance(value, bool):
        return value
    if text and isinstance(value, str) and value.strip().lower() in TRUE + FALSE:
        return value.strip().lower() in TRUE
    raise ValueError(f"{short_repr(value)} is neither true nor false")


def _as_int(value: Any, *, text: bool) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if text and isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,30}\s*", value):
        return int(value)
    raise ValueError(f"{short_repr(value)} is not a whole number")


def _as_float(value: Any) -> float:
    # YAML 1.1 reads 1e-3, without a point, as text: text that is a number is one, wherever it stands.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{short_repr(value)} is not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{short_repr(value)} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{short_repr(value)} is not a finite number")
    return number
