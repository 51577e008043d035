"""Token ids → sequences: windows of the rows or streams that a file holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from peelcli.calibration.split import spread_indices, unique_rows


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive token ids, (n_ids,), already checked against the vocabulary.

    `begins` says that the first of them begins a sequence (a row of a 2-D array), not any point of a stream.
    """

    ids: np.ndarray
    begins: bool


class TokenPool:
    """Segments from which windows are cut."""

    def __init__(self, segments: Sequence[Segment], bos: int | None, eos: int | None) -> None:
        self._segments = segments
        self._eos = eos
        self.bos = bos
        self.n_tokens = sum(len(segment.ids) for segment in segments)
        self.longest: int | None = max((len(segment.ids) for segment in segments), default=0)

    def rows(self, seq_len: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[str, ...]]:
        """Up to `count` distinct windows, (n_seq, seq_len) int64, spread over the data and in its order.

        Windows begin at a row's start, at BOS, or behind EOS where BOS is not known; only where those are too
        few, one window follows the other. Returns the rows and notes for the report.
        """
        proper = [_apart(self._starts(segment), seq_len, len(segment.ids)) for segment in self._segments]
        rows, notes = self._windows(proper, seq_len), []
        if len(rows) < count:
            every = [range(0, len(segment.ids) - seq_len + 1, seq_len) for segment in self._segments]
            packed = self._windows(every, seq_len)
            if len(packed) > len(rows):
                rows = packed
                notes.append(
                    "windows of the token ids start mid-document, since too few rows, BOS or EOS marks give "
                    "enough starts: the loss may be off by up to tenths of a nat"
                )
        if len(rows) > count:
            rows = rows[spread_indices(len(rows), count, rng)]
        return rows, tuple(notes)

    def _starts(self, segment: Segment) -> np.ndarray:
        """Ascending positions at which a training sequence began."""
        marks = np.empty(0, dtype=np.int64)
        if self.bos is not None:
            marks = np.flatnonzero(segment.ids == self.bos)
        elif self._eos is not None:
            marks = np.flatnonzero(segment.ids == self._eos) + 1
        return np.union1d(marks, [0]).astype(np.int64) if segment.begins else marks

    def _windows(self, starts: Sequence[Iterable[int]], seq_len: int) -> np.ndarray:
        """The distinct windows at these starts of each segment, (n, seq_len) int64."""
        windows = [
            segment.ids[start : start + seq_len]
            for segment, at in zip(self._segments, starts, strict=True)
            for start in at
        ]
        if not windows:
            return np.empty((0, seq_len), dtype=np.int64)
        return unique_rows(np.stack(windows).astype(np.int64))


def _apart(starts: np.ndarray, seq_len: int, size: int) -> list[int]:
    """The starts, from the first on, whose windows fit and do not overlap."""
    kept: list[int] = []
    for start in starts.tolist():
        if start + seq_len <= size and (not kept or start >= kept[-1] + seq_len):
            kept.append(start)
    return kept
