"""The kinds of calibration files, and the parts of large files that are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peelcli.errors import CalibrationError

TEXT_SUFFIXES = (".txt", ".jsonl")
TOKEN_SUFFIXES = (".npy", ".bin")


def holds_text(paths: Sequence[Path]) -> bool:
    """Whether the files hold text (True) or token ids (False), by their suffixes.

    Raises CalibrationError on a missing file, an unknown suffix, or a mixture of the two.
    """
    for path in paths:
        if not path.is_file():
            raise CalibrationError(f"{path}: expected a file, found none; check the path given with --data")
        if path.suffix.lower() not in TEXT_SUFFIXES + TOKEN_SUFFIXES:
            found = repr(path.suffix) if path.suffix else "no suffix"
            raise CalibrationError(
                f"{path}: expected a name that ends in .txt, .jsonl (text), .npy or .bin (token ids), "
                f"found {found}; convert or rename the file"
            )
    kinds = {path.suffix.lower() in TEXT_SUFFIXES for path in paths}
    if len(kinds) > 1:
        raise CalibrationError(
            "--data: expected either text or token ids, found both; pass files of one kind"
        )
    return kinds == {True}


def spread_slices(size: int, limit: int, length: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Ranges of [0, size) of at most `limit` in total: everything, or evenly spaced disjoint ranges."""
    if size <= limit:
        return [(0, size)]
    length = min(length, limit)
    count = limit // length
    stride = size / count
    starts = [int(i * stride + u * (stride - length)) for i, u in enumerate(rng.random(count))]
    return [(start, start + length) for start in starts]
