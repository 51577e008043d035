"""Find padding in token ids, by the checkpoint's pad token and by repeated ids at the ends of rows, and remove it.

Padding was never trained on as text. A row that is scored with it gets a loss of another text, and token frequencies
count what is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peelcli.calibration.token_ids import Segment
from peelcli.records.special_ids import SpecialIds

_TAIL = 4  # equal ids at a row's end: no text ends so often in them…
_ENOUGH_ROWS = 0.2  # …in this part of all rows, and in three at least


def without_padding(segments: Sequence[Segment], special: SpecialIds) -> tuple[list[Segment], dict[int, int]]:
    """The segments without padding, and the number of removed ids for each pad token.

    What follows padding begins a sequence. A pad token that is another token as well (EOS, or one that mostly stands
    alone between others) is padding only where it is repeated; of the repetitions, one EOS stays behind the text and
    one BOS ahead of it.
    """
    kept, removed = list(segments), {}
    named = special.pad | special.eos
    for token in sorted(named | _repeated_ends(segments)):
        doubtful = token not in special.pad or token in special.bos | special.eos
        shortest = 2 if doubtful or _mostly_alone(kept, token) else 1
        pieces, count = [], 0
        for segment in kept:
            spans = _padding(segment, token, shortest, special, only_ends=token not in named)
            count += sum(end - start for start, end in spans)
            pieces += _between(segment, spans)
        if count:
            kept, removed[token] = pieces, count
    return kept, removed


def _repeated_ends(segments: Sequence[Segment]) -> set[int]:
    """The ids that begin or end many rows in runs, although no file declares them as padding."""
    rows = [segment.ids for segment in segments if segment.begins and len(segment.ids) > _TAIL]
    if not rows:
        return set()
    found = set()
    for side in (slice(-_TAIL, None), slice(None, _TAIL)):
        ends = np.stack([row[side] for row in rows])
        varied = np.array([bool((row != row[0]).any()) for row in rows])
        same = (ends == ends[:, :1]).all(axis=1) & varied
        ids, counts = np.unique(ends[same, 0], return_counts=True)
        found |= {int(i) for i, n in zip(ids, counts, strict=True) if n >= max(3, _ENOUGH_ROWS * len(rows))}
    return found


def _mostly_alone(segments: Sequence[Segment], token: int) -> bool:
    """Whether most runs of a token have length one with other tokens on both sides, as for a token used as text."""
    alone = runs = 0
    for segment in segments:
        for start, end in _runs(segment.ids, token):
            runs += 1
            alone += end - start == 1 and start > 0 and end < len(segment.ids)
    return 2 * alone > runs


def _runs(ids: np.ndarray, token: int) -> list[tuple[int, int]]:
    """Start and end of each run of a token."""
    at = np.flatnonzero(ids == token)
    if not len(at):
        return []
    breaks = np.flatnonzero(np.diff(at) > 1)
    starts, ends = at[np.r_[0, breaks + 1]], at[np.r_[breaks, len(at) - 1]] + 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _padding(
    segment: Segment, token: int, shortest: int, special: SpecialIds, *, only_ends: bool
) -> list[tuple[int, int]]:
    """The ranges of a segment that are padding with this token."""
    size, spans = len(segment.ids), []
    for start, end in _runs(segment.ids, token):
        if end - start < shortest or (only_ends and start > 0 and end < size):
            continue
        start += token in special.eos and start > 0
        end -= token in special.bos and end < size
        if start < end:
            spans.append((start, end))
    return spans


def _between(segment: Segment, spans: Sequence[tuple[int, int]]) -> list[Segment]:
    """The pieces of a segment between the given ranges."""
    if not spans:
        return [segment]
    edges = [0, *(edge for span in spans for edge in span), len(segment.ids)]
    pieces = zip(edges[::2], edges[1::2], strict=True)
    return [
        Segment(segment.ids[start:end], begins=segment.begins or start > 0)
        for start, end in pieces
        if start < end
    ]
