"""Build records from JSON values and check them. The files are untrusted and may come from another version."""

from __future__ import annotations

import math
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(kind: type[T], value: Any, where: str = "", *, unbounded: Collection[str] = ()) -> T:
    """An instance of the record `kind` from JSON values that `dataclasses.asdict` produced.

    Keys that the record does not know are passed over, and those that it has a default for may be missing. unbounded:
    names of fields whose numbers may be infinite or NaN. Raises ValueError that says where which value was not what was
    expected.
    """
    if not isinstance(value, Mapping):
        raise _unexpected(where, "an object", value)
    hints = _hints(kind)  # type: ignore[arg-type]
    made = {}
    for field in fields(kind):  # type: ignore[arg-type]
        place = f"{where}.{field.name}".lstrip(".")
        if field.name in value:
            made[field.name] = _value(hints[field.name], value[field.name], place, unbounded, field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{place}: is missing")
    return kind(**made)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _value(hint: Any, value: Any, where: str, unbounded: Collection[str], name: str) -> Any:
    """`value` converted to the type `hint`. name: of the field, for messages."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (only,) = (kind for kind in inner if kind is not type(None))
        return _value(only, value, where, unbounded, name)
    if is_dataclass(hint):
        return from_json(hint, value, where, unbounded=unbounded)  # type: ignore[arg-type]
    if origin is tuple:
        return _tuple(inner, value, where, unbounded, name)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _unexpected(where, "an object", value)
        return {
            str(key): _value(inner[1], item, f"{where}.{key}", unbounded, name) for key, item in value.items()
        }
    return _plain(hint, value, where, name in unbounded)


def _tuple(
    inner: tuple[Any, ...], value: Any, where: str, unbounded: Collection[str], name: str
) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _unexpected(where, "a list", value)
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
    if len(kinds) != len(value):
        raise _unexpected(where, f"a list of {len(kinds)}", value)
    return tuple(
        _value(kind, item, f"{where}[{place}]", unbounded, name)
        for place, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _plain(hint: Any, value: Any, where: str, is_unbounded: bool) -> Any:
    if hint in (object, Any):
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (is_unbounded or math.isfinite(number)):
            raise _unexpected(where, "a finite number", value)
        return number
    if hint is not float and type(value) is hint:
        return value
    raise _unexpected(
        where, {str: "text", float: "a number", int: "a whole number"}.get(hint, "a truth value"), value
    )


def _unexpected(where: str, expected: str, value: Any) -> ValueError:
    found = repr(value)
    return ValueError(
        f"{where or 'the whole'}: expected {expected}, found {found[:60]}{'...' * (len(found) > 60)}"
    )
