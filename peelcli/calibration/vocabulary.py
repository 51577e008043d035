"""The border check on token ids: an id outside the embedding would crash a GPU and silently wrap in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peelcli.errors import CalibrationError


def check_ids(ids: np.ndarray, vocab_size: int, where: Callable[[tuple[int, ...]], str], remedy: str) -> None:
    """Raise CalibrationError for the first id outside [0, vocab_size).

    `where` puts its index into words, `remedy` says what to do.
    """
    outside = (ids < 0) | (ids >= vocab_size)
    if not outside.any():
        return
    index = tuple(int(i) for i in np.unravel_index(int(outside.argmax()), ids.shape))
    raise CalibrationError(
        f"token id {int(ids[index])} at {where(index)}: expected ids from 0 to {vocab_size - 1}, "
        f"since the checkpoint's vocabulary has {vocab_size} entries; {remedy}"
    )
