"""Convert hidden states between a model's own layout and peel's, (n_seq, seq_len, d_model).

Most families use peel's layout. Some have several residual streams: DeepSeek-V4 has (n_seq, seq_len, streams, width),
Gemma 3n (streams, n_seq, seq_len, width). CPM-Ant puts a prompt of its own before the tokens. In peel's layout one row
holds all features of one token. The states of the extra prompt positions are appended to those rows as features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn


@dataclass(frozen=True)
class Layout:
    """A model's own layout of hidden states.

    axes: the axes of n_seq and seq_len. rest: the sizes of the other axes, in order. before: how many positions the
    model puts before the first token.
    """

    axes: tuple[int, int] = (0, 1)
    rest: tuple[int, ...] = ()
    before: int = 0

    @classmethod
    def of(cls, ids: Size, shape: Size, more_rows: Size, shorter: Size) -> Layout | None:
        """Derive the layout from the shapes of the hidden states of three batches.

        ids: shape of the token ids. shape: the hidden states of `ids`. more_rows: of a batch with more sequences.
        shorter: of a batch whose sequences are one token shorter. None if n_seq and seq_len cannot be located.
        """
        axes = [
            [axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
            for other in (more_rows, shorter)
        ]
        if any(len(found) != 1 for found in axes) or axes[0] == axes[1]:
            return None
        rows, tokens = axes[0][0], axes[1][0]
        before = shape[tokens] - ids[1]
        if shape[rows] != ids[0] or before < 0 or shorter[tokens] != shape[tokens] - 1:
            return None
        return cls((rows, tokens), tuple(s for i, s in enumerate(shape) if i not in (rows, tokens)), before)

    @property
    def is_plain(self) -> bool:
        """Whether the model's layout is already (n_seq, seq_len, d_model)."""
        return self.axes == (0, 1) and len(self.rest) <= 1 and not self.before

    def rows(self, hidden: Tensor) -> Tensor:
        """From the model's own layout to (n_seq, seq_len, d_model)."""
        if self.is_plain:
            return hidden
        flat = hidden.movedim(self.axes, (0, 1)).flatten(2)
        if not self.before:
            return flat
        first, own = flat[:, : self.before], flat[:, self.before :]
        num = own.shape[1]
        share = -(-self.before // num)  # positions before the first token, for each token
        first = nn.functional.pad(first, (0, 0, 0, share * num - self.before))
        # (n_seq, share, seq_len, width) → (n_seq, seq_len, share·width)
        first = first.unflatten(1, (share, num)).movedim(1, 2).flatten(2)
        return torch.cat([own, first], dim=2)

    def own(self, rows: Tensor) -> Tensor:
        """From (n_seq, seq_len, d_model) to the model's own layout."""
        if self.is_plain:
            return rows
        width = math.prod(self.rest)
        if self.before:
            own, first = rows[..., :width], rows[..., width:]
            first = first.unflatten(2, (-1, width)).movedim(2, 1).flatten(1, 2)
            rows = torch.cat([first[:, : self.before], own], dim=1)
        unfolded: Tensor = rows.unflatten(2, self.rest)
        return unfolded.movedim((0, 1), self.axes)
