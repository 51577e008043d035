"""The optimiser step at which a checkpoint was saved."""

from __future__ import annotations

import re
from pathlib import Path

from peelcli.errors import CheckpointError
from peelcli.runtime.small_files import NOT_FINITE, parse_json, read_bounded

_STEP = re.compile(r"(?:checkpoint|step|iter|global_step)[-_]?(\d+)$", re.IGNORECASE)
_LARGEST_STATE = 2**27  # bytes of trainer_state.json, which logs each step of a run
_LARGEST_STEP = 2**53


def training_step(directory: Path) -> int | None:
    """The optimiser step of a checkpoint, from trainer_state.json or the directory's name; None if neither has it.

    Raises CheckpointError if trainer_state.json is damaged.
    """
    state = directory / "trainer_state.json"
    if state.is_file():
        try:
            step = parse_json(read_bounded(state, _LARGEST_STATE), constants=NOT_FINITE).get("global_step")
        except (ValueError, AttributeError, OSError) as error:
            why = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"{state}: not the JSON object that the Trainer writes ({why}); mend or remove it."
            ) from error
        if type(step) is int and 0 <= step <= _LARGEST_STEP:
            return step
    match = _STEP.search(directory.resolve().name)
    step = int(match.group(1)[:20]) if match else None
    return step if step is None or step <= _LARGEST_STEP else None
