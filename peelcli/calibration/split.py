"""Split sequences into fit, select and eval, which share no sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

PARTS = ("fit", "select", "eval")
MIN_SEQUENCES = 8  # per part: fewer give no interval worth reading


@dataclass(frozen=True, eq=False)
class Split:
    """Three disjoint sets of sequences; each is (n_seq_i, seq_len) int64 token ids."""

    fit: np.ndarray
    select: np.ndarray
    eval: np.ndarray

    @property
    def sequences(self) -> np.ndarray:
        """All sequences, (n_seq, seq_len): those of fit, then of select, then of eval."""
        return np.concatenate([self.fit, self.select, self.eval])

    @property
    def slices(self) -> dict[str, slice]:
        """The rows of `sequences` that belong to each part."""
        first, second = len(self.fit), len(self.fit) + len(self.select)
        total = second + len(self.eval)
        return {"fit": slice(0, first), "select": slice(first, second), "eval": slice(second, total)}

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) of the ids and of the split."""
        digest = hashlib.sha256()
        for part in (self.fit, self.select, self.eval):
            digest.update(f"{part.shape[0]}x{part.shape[1]};".encode())
            digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
        return digest.hexdigest()


def wanted_counts(tokens: Mapping[str, int], seq_len: int) -> tuple[int, int, int]:
    """The number of sequences for each part's budget in tokens, at least `MIN_SEQUENCES`."""
    fit, select, evaluation = (max(MIN_SEQUENCES, tokens[part] // seq_len) for part in PARTS)
    return fit, select, evaluation


def shrink_counts(wanted: tuple[int, int, int], available: int) -> tuple[int, int, int]:
    """The counts for `available` sequences: proportional to `wanted`, and never above it.

    Each stays at least `MIN_SEQUENCES`, so `available` must be three times that.
    """
    total = sum(wanted)
    if available >= total:
        return wanted
    counts = [max(MIN_SEQUENCES, available * count // total) for count in wanted]
    while sum(counts) > available:  # only the minimum can have lifted the sum
        counts[counts.index(max(counts))] -= 1
    while sum(counts) < available:  # what rounding down left over
        missing = [want - count for want, count in zip(wanted, counts, strict=True)]
        counts[missing.index(max(missing))] += 1
    return counts[0], counts[1], counts[2]


def split_rows(rows: np.ndarray, counts: tuple[int, int, int], seed: int) -> Split:
    """Split distinct `rows` (n_seq, seq_len) into parts of the given sizes.

    The parts are interleaved over the text, and within a part the rows keep the order of the text.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(rows))
    fit, select, evaluation = np.split(order[: sum(counts)], np.cumsum(counts)[:2])
    return Split(*(rows[np.sort(part)] for part in (fit, select, evaluation)))


def spread_indices(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` distinct indices below `total`, ascending: one drawn from each of `count` equal ranges."""
    edges = np.arange(count + 1) * total // count
    return rng.integers(edges[:-1], edges[1:])


def unique_rows(rows: np.ndarray) -> np.ndarray:
    """The distinct rows in their order. A copy of a row in another part would leak fit data into the evaluation."""
    first = {row.tobytes(): index for index, row in reversed(list(enumerate(rows)))}
    return rows[sorted(first.values())]
