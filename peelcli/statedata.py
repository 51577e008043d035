"""Trained states of one part of the split, as the data that references are fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peelcli.activations import ActivationFile
from peelcli.references.interface import Batch

_CACHE_NBYTES = 2**28  # states up to 256 MB a layer are held in memory while the layer is fitted


class StateData:
    """Inputs, and targets O_target, of the sequences of `part`, on `device` in `dtype`."""

    def __init__(
        self,
        acts: ActivationFile,
        part: str,
        inputs: int | Tensor,
        target: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`part` is fit, select or eval. inputs: O_inputs, or states of the sequences of all parts."""
        self._acts, self._rows = acts, acts.rows[part]
        self._inputs, self._target = inputs, target
        self._device, self._dtype = device, dtype
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """How many sequences there are."""
        return self._rows.stop - self._rows.start

    def _states(self, layer: int, rows: Sequence[int]) -> Tensor:
        if layer not in self._kept:
            probe = self._acts.states(layer, slice(self._rows.start, self._rows.start + 1))
            if probe.numel() * probe.element_size() * len(self) > _CACHE_NBYTES:
                start = self._rows.start
                parts = [self._acts.states(layer, slice(start + r, start + r + 1)) for r in rows]
                return torch.cat(parts).to(self._device, self._dtype)
            self._kept[layer] = self._acts.states(layer, self._rows)
        return self._kept[layer][list(rows)].to(self._device, self._dtype)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The sequences `rows`, counted from the start of the part."""
        ids = self._acts.ids[self._rows][list(rows)]
        if isinstance(self._inputs, Tensor):
            inputs = self._inputs[self._rows][list(rows)].to(self._device, self._dtype)
        else:
            inputs = self._states(self._inputs, rows)
        return Batch(ids, inputs, self._states(self._target, rows))
