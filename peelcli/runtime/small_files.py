"""Read small untrusted text files in bounded memory, and parse their JSON strictly."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # what half a surrogate pair is written with
INFINITIES = ("Infinity", "-Infinity")
NOT_FINITE = ("NaN", *INFINITIES)
_DEEPEST = 64  # levels of nesting; peel and the Trainer write fewer than ten


def read_bounded(path: Path | str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    OSError with a `strerror` in words where it is no regular file (a device or a pipe could go on for ever) or larger.
    """
    # A pipe without a writer would block at its opening.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        require_regular(handle, path, limit)
        data = file.read(limit + 1)
    if len(data) > limit:  # it has grown since
        raise _refused(path, _too_large(limit))
    return data


def require_regular(handle: int, path: Path | str, limit: int) -> None:
    """Raise OSError, with a readable `strerror`, unless the open file is a regular one of at most `limit` bytes."""
    found = os.fstat(handle)
    if stat.S_ISDIR(found.st_mode):
        raise _refused(path, "it is a directory, expected a file", errno.EISDIR)
    if not stat.S_ISREG(found.st_mode):
        raise _refused(path, "it is a device, a pipe or a socket, expected a regular file")
    if found.st_size > limit:
        raise _refused(path, f"{_too_large(limit)}: it has {found.st_size:,} bytes")


def parse_json(data: bytes | str, *, constants: Sequence[str] = ()) -> Any:
    """The value of a JSON text in UTF-8. ValueError where it is none, nested too deeply, or holds half a character.

    constants: which of NaN, Infinity and -Infinity, which Python writes, may stand in it.
    """

    def constant(name: str) -> float:
        if name not in constants:
            raise ValueError(f"{name} is no JSON number")
        return float(name)

    raw = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_depth(value)
    if _HALF_PAIR.search(raw):
        _check_text(value)
    return value


def _check_depth(value: Any) -> None:
    level = _inner(value)
    for _ in range(_DEEPEST):
        if not level:
            return
        level = [item for one in level for item in _inner(one)]
    raise ValueError("it is nested too deeply")


def _inner(value: Any) -> list[Any]:
    """The lists and objects directly inside a value."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, (dict, list))]


def _check_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("it holds half a surrogate pair, which is no character") from error


def _too_large(limit: int) -> str:
    return (
        f"it is larger than {limit // 2**20} MB"
        if limit >= 2**20
        else f"it is larger than {limit // 2**10} KB"
    )


def _refused(path: Path | str, why: str, number: int = errno.EINVAL) -> OSError:
    return OSError(number, why, str(path))
