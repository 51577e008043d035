"""Token ids → sequences: windows of the rows or streams in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from peelcli.calibration.split import spread_indices, unique_rows
from peelcli.records import Finding


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive token ids, (n_ids,), already checked against the vocabulary.

    `begins` says that the first of them begins a sequence (a row of a 2-D array), not any point of a stream.
    """

    ids: np.ndarray
    begins: bool


class TokenPool:
    """Segments from which windows are cut."""

    def __init__(
        self,
        segments: Sequence[Segment],
        bos: int | None,
        eos: int | None,
        padding: Mapping[int, int] = MappingProxyType({}),
        name: str = "the data",
    ) -> None:
        """padding: number of ids of each pad token removed from the data. name: describes the data."""
        self._segments = segments
        self._padding, self._name = padding, name
        self._eos = eos
        self.bos = bos
        self.n_tokens = sum(len(segment.ids) for segment in segments)
        self.longest: int | None = max((len(segment.ids) for segment in segments), default=0)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The finding about removed padding, for the report."""
        if not self._padding:
            return ()
        count = sum(self._padding.values())
        ids = ", ".join(f"id {token}: {n:,}" for token, n in self._padding.items())
        message = (
            f"{count:,} of the {self.n_tokens + count:,} token ids in {self._name} are padding ({ids}) and were left "
            "out: neither run, nor scored, nor counted"
        )
        return (Finding("padding", message),)

    def rows(self, seq_len: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[str, ...]]:
        """Up to `count` distinct windows, (n_seq, seq_len) int64, spread over the data and in its order.

        Windows begin at a row's start, at BOS, or behind EOS where BOS is not known; only where those are too
        few, one window follows the other, and where the rows had padding, one row the other. Returns the rows and
        notes for the report.
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
        if len(rows) < count and self._padding:
            running = self._running_on(seq_len)
            if len(running) > len(rows):
                rows = running
                notes = [
                    f"too few rows have {seq_len} tokens without their padding, so sequences run on into the next row"
                ]
        if len(rows) > count:
            rows = rows[spread_indices(len(rows), count, rng)]
        return rows, tuple(notes)

    def _running_on(self, seq_len: int) -> np.ndarray:
        """The distinct windows that begin at a row's start and continue into the following rows, (n, seq_len) int64."""
        ids = np.concatenate([segment.ids for segment in self._segments])
        begins = np.cumsum([0, *(len(segment.ids) for segment in self._segments[:-1])])
        starts = begins[[segment.begins for segment in self._segments]]
        return _distinct([ids[at : at + seq_len] for at in _apart(starts, seq_len, len(ids))], seq_len)

    def _starts(self, segment: Segment) -> np.ndarray:
        """Ascending positions at which training sequences began."""
        marks = np.empty(0, dtype=np.int64)
        if self.bos is not None:
            marks = np.flatnonzero(segment.ids == self.bos)
        elif self._eos is not None:
            marks = np.flatnonzero(segment.ids == self._eos) + 1
        return np.union1d(marks, [0]).astype(np.int64) if segment.begins else marks

    def _windows(self, starts: Sequence[Iterable[int]], seq_len: int) -> np.ndarray:
        """The distinct windows at the given starts of each segment, (n, seq_len) int64."""
        windows = [
            segment.ids[start : start + seq_len]
            for segment, at in zip(self._segments, starts, strict=True)
            for start in at
        ]
        return _distinct(windows, seq_len)


def _distinct(windows: Sequence[np.ndarray], seq_len: int) -> np.ndarray:
    if not windows:
        return np.empty((0, seq_len), dtype=np.int64)
    return unique_rows(np.stack(windows).astype(np.int64))


def _apart(starts: np.ndarray, seq_len: int, size: int) -> list[int]:
    """The starts, taken greedily from the first, whose windows fit and do not overlap."""
    kept: list[int] = []
    for start in starts.tolist():
        if start + seq_len <= size and (not kept or start >= kept[-1] + seq_len):
            kept.append(start)
    return kept
