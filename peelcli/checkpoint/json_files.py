"""JSON files of a checkpoint: regular files of bounded size and depth, with what is wrong named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peelcli.errors import CheckpointError

MAX_NBYTES = 64 * 2**20  # the index of a checkpoint with 200,000 tensors has 30 MB
MAX_DEPTH = 64  # of objects and lists in each other; config.json has four or five
ANEW = "copy or download the checkpoint again, or save it with save_pretrained"


def read_object(file: Path, remedy: str = ANEW) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError where it is anything else, too large, or nested too deep.

    NaN is refused, since no setting can be NaN. Infinity is kept: some families' settings are.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: expected a regular file; {remedy}")
    try:
        size = file.stat().st_size
        if size > MAX_NBYTES:
            raise CheckpointError(
                f"{file}: has {size:,} bytes, expected at most {MAX_NBYTES:,} of JSON; {remedy}"
            )
        value = json.loads(file.read_text(encoding="utf-8"), parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found a {type(value).__name__}; {remedy}")
    if is_deeper(value, MAX_DEPTH):
        raise CheckpointError(f"{file}: its JSON is nested more than {MAX_DEPTH} deep; {remedy}")
    return value


def _constant(word: str) -> float:
    if word == "NaN":
        raise ValueError("it holds NaN, which is no value of a setting")
    return float(word)


def is_deeper(value: object, depth: int) -> bool:
    """Whether objects and lists lie in each other more than `depth` deep."""
    level = [value]
    for _ in range(depth + 1):
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        if not inner:
            return False
        level = inner
    return True
