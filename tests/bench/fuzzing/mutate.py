"""Damage that knows nothing of a format but its frame: bytes, JSON and YAML values, lines of text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutate = Callable[[random.Random, Path, Path], None]

HOSTILE_TEXT = (
    "",
    "\x00",
    "x\n::error::owned",
    "::add-mask::m",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\u202edesrever",
    "##[error]z",
    "\ud83d",
    "../../../etc/passwd",
    "/dev/zero",
    "-1",
    "nan",
    "model.layers.99999999999.x",
    "a" * 100_000,
)
HOSTILE_NUMBERS = (0, -1, 1, 2, 3, 7, 10**5, 10**9, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 1e-308)
HOSTILE = (
    None,
    True,
    False,
    *HOSTILE_NUMBERS,
    *HOSTILE_TEXT,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [None],
    {"": None},
)
DEEP = 3000  # levels


def bytes_changed(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut out, doubled, put in or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice((1, 4, 64, 4096)))
        match rng.randrange(6):
            case 0 | 1:
                if at < len(changed):
                    changed[at] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at:end]
            case 3:
                changed[at:at] = changed[at:end]
            case 4:
                changed[at:at] = rng.randbytes(rng.choice((1, 8, 200)))
            case 5:
                del changed[at:]
    return bytes(changed)


def value_changed(rng: random.Random, value: Any) -> Any:
    """A JSON value with one to three of its places changed."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed_somewhere(rng, value)
    return value


def _changed_somewhere(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        value, key = dict(value), rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[rng.choice(HOSTILE_TEXT)] = value.pop(key)
            case 2:
                value[rng.choice(HOSTILE_TEXT) + "x"] = rng.choice(HOSTILE)
            case _:
                value[key] = _changed_somewhere(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        value, at = list(value), rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                del value[at]
            case 1:
                value[at:at] = [value[at]] * rng.choice((1, 2, 1000))
            case _:
                value[at] = _changed_somewhere(rng, value[at])
        return value
    match rng.randrange(6):
        case 0:
            return [value]
        case 1 if isinstance(value, (int, float)):
            return value * rng.choice((-1, 2, 10, 1000, 10**6))
        case 2 if isinstance(value, str):
            return value + rng.choice(HOSTILE_TEXT)
    return rng.choice(HOSTILE)


def change_bytes(rng: random.Random, source: Path, target: Path) -> None:
    """Damage a file of any format."""
    target.write_bytes(bytes_changed(rng, source.read_bytes()))


def change_json(rng: random.Random, source: Path, target: Path) -> None:
    """Damage the values of a JSON file, which stays JSON."""
    value = value_changed(rng, json.loads(source.read_text(encoding="utf-8")))
    target.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))


def nest_json(rng: random.Random, source: Path, target: Path) -> None:
    """A JSON file in which a value, or all of it, is nested deep."""
    value = json.loads(source.read_text(encoding="utf-8"))
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
    deep = opened * DEEP + "1" + closed * DEEP
    if isinstance(value, dict) and value and rng.random() < 0.7:
        key = rng.choice(list(value))
        text = json.dumps(value | {key: "<deep>"}).replace('"<deep>"', deep)
    else:
        text = deep
    target.write_text(text, encoding="utf-8")


def change_json_lines(rng: random.Random, source: Path, target: Path) -> None:
    """Damage the values of some lines of a file of JSON lines."""
    lines = source.read_text(encoding="utf-8").splitlines()
    at = rng.randrange(len(lines))
    changed = json.dumps(value_changed(rng, json.loads(lines[at])))
    lines[at] = rng.choice((changed, changed[: len(changed) // 2], "[" * DEEP, rng.choice(HOSTILE_TEXT)))
    target.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def special_file(rng: random.Random, source: Path, target: Path) -> None:
    """Something that is no file of bytes: a device, a directory, a link that leads to itself or nowhere, nothing."""
    match rng.randrange(6):
        case 0:
            target.symlink_to("/dev/zero")
        case 1:
            target.symlink_to(target.name)
        case 2:
            target.symlink_to("missing")
        case 3:
            target.mkdir()
        case 4:
            target.write_bytes(b"")
        case 5:
            target.write_bytes(bytes(rng.choice((1, 8, 10_000))))


ANY: dict[str, Mutate] = {"bytes": change_bytes, "special": special_file}
JSON: dict[str, Mutate] = {"json": change_json, "json again": change_json, "nested": nest_json, **ANY}
JSON_LINES: dict[str, Mutate] = {"json lines": change_json_lines, **ANY}
