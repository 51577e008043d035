"""Trained states of one part of the split, as the data that references are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from peelcli.references.interface import Batch
from peelcli.runtime.batch_sizes import free_memory
from peelcli.storage.activations import ActivationFile

_HELD_NBYTES = 2**28  # states up to 256 MB of a layer and part are held on a processor…
_LAYERS = 4  # …of so many at once; a GPU holds a quarter of what is free
_ENTRIES = (
    8  # layers and parts, at most: what a layer's fits ask for, inputs and targets up to three layers on
)


class CachedStates:
    """The states of the layers that were asked for last, on `device` in `dtype`; may be asked by several threads."""

    def __init__(self, acts: ActivationFile, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing is read yet."""
        self.acts, self.device, self.dtype = acts, device, dtype
        self._most = free_memory(device) // 4 or _LAYERS * _HELD_NBYTES
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._lock = Lock()

    def rows(self, part: str, layer: int, rows: Sequence[int]) -> Tensor:
        """O_layer (n, seq_len, d_model) of some sequences, counted from the start of the part."""
        whole = self._whole(part, layer)
        if whole is not None:
            return picked(whole, rows)
        start = self.acts.rows[part].start
        return torch.cat([self._read(layer, slice(start + r, start + r + 1)) for r in rows])

    def clear(self) -> None:
        """Let go of all."""
        self._kept.clear()

    def _read(self, layer: int, rows: slice) -> Tensor:
        return self.acts.states(layer, rows).to(self.device, self.dtype)

    def _whole(self, part: str, layer: int) -> Tensor | None:
        """The states of all sequences of a part; None where they are too large to be held."""
        with self._lock:
            kept = self._kept.pop((part, layer), None)
            if kept is None:
                rows = self.acts.rows[part]
                one = self._read(layer, slice(rows.start, rows.start + 1))
                nbytes = one.numel() * one.element_size() * (rows.stop - rows.start)
                if nbytes > self._most // _LAYERS:
                    return None
                while self._kept and (self.nbytes + nbytes > self._most or len(self._kept) >= _ENTRIES):
                    del self._kept[next(iter(self._kept))]  # the one asked for least lately
                kept = self._read(layer, rows)
            self._kept[part, layer] = kept
            return kept

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(t.numel() * t.element_size() for t in self._kept.values())


class StateData:
    """Inputs, and targets O_target, of the sequences of `part`, where and as `held` has them."""

    def __init__(self, held: CachedStates, part: str, inputs: int | Tensor, target: int) -> None:
        """`part` is fit, select or eval. inputs: O_inputs, or states of the sequences of all parts."""
        self._held, self._part = held, part
        self._rows = held.acts.rows[part]
        self._inputs, self._target = inputs, target

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(range(self._rows.start, self._rows.stop))

    def batch(self, rows: Sequence[int]) -> Batch:
        """The sequences `rows`, counted from the start of the part."""
        held = self._held
        if isinstance(self._inputs, Tensor):
            inputs = picked(self._inputs[self._rows], rows).to(held.device, held.dtype)
        else:
            inputs = held.rows(self._part, self._inputs, rows)
        ids = picked(held.acts.ids[self._rows], rows)
        return Batch(ids, inputs, held.rows(self._part, self._target, rows))


def picked(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor; neighbours without a copy."""
    if isinstance(rows, range) and rows.step == 1:
        return values[rows.start : rows.stop]
    return values[list(rows)]
