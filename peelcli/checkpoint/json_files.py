"""Read the JSON files of a checkpoint, with limits on size and nesting depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peelcli.errors import CheckpointError
from peelcli.runtime.small_files import INFINITIES, parse_json, read_bounded

MAX_NBYTES = 64 * 2**20  # the index of a checkpoint with 200,000 tensors has 30 MB
ANEW = "copy or download the checkpoint again, or save it with save_pretrained"


def read_object(file: Path, remedy: str = ANEW) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError if it is no object, too large, or nested too deeply.

    NaN is refused, because no setting can be NaN. Infinity is allowed, because some families have infinite settings.
    """
    try:
        value = parse_json(read_bounded(file, MAX_NBYTES), constants=INFINITIES)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{file}: cannot be read as JSON ({why}); {remedy}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found a {type(value).__name__}; {remedy}")
    return value


def read_object_if_whole(file: Path) -> dict[str, Any]:
    """The JSON object in a file that no result depends on; {} if the file is missing or damaged."""
    try:
        return read_object(file)
    except CheckpointError:
        return {}
