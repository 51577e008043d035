"""The layout of a model's hidden states, and the one that peel keeps them in: (n_seq, seq_len, d_model).

Most families lay them out so. Some have several streams: DeepSeek-V4 has (n_seq, seq_len, streams, width), Gemma 3n
(streams, n_seq, seq_len, width). All features of one token become one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Size, Tensor


@dataclass(frozen=True)
class Layout:
    """axes: where n_seq and seq_len are in the model's own layout; rest: the sizes of its other axes, in order."""

    axes: tuple[int, int] = (0, 1)
    rest: tuple[int, ...] = ()

    @classmethod
    def of(cls, shape: Size, more_rows: Size, shorter: Size) -> Layout | None:
        """Learn it from the shapes of a batch, one of more sequences and one of shorter ones; None if it has no such axes."""
        axes = [
            [axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
            for other in (more_rows, shorter)
        ]
        if any(len(found) != 1 for found in axes) or axes[0] == axes[1]:
            return None
        first, second = axes[0][0], axes[1][0]
        return cls((first, second), tuple(s for i, s in enumerate(shape) if i not in (first, second)))

    @property
    def is_plain(self) -> bool:
        """Whether it is (n_seq, seq_len, d_model) already."""
        return self.axes == (0, 1) and len(self.rest) <= 1

    def rows(self, hidden: Tensor) -> Tensor:
        """From the model's own layout to (n_seq, seq_len, d_model)."""
        return hidden if self.is_plain else hidden.movedim(self.axes, (0, 1)).flatten(2)

    def own(self, rows: Tensor) -> Tensor:
        """From (n_seq, seq_len, d_model) to the model's own layout."""
        if self.is_plain:
            return rows
        assert rows.shape[-1] == math.prod(self.rest)
        return rows.unflatten(2, self.rest).movedim((0, 1), self.axes)
