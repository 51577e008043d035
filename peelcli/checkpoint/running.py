"""How the tensors of a checkpoint become the weights that it runs with, where those are not the same.

The rules themselves are handed in as functions: this room knows where a weight lies and what it is called, not what
quantisation is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peelcli.checkpoint.packed.codes import Packing
from peelcli.records import QuantizedModule

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Latent:
    """Weights that are stored as they were trained, and rounded whenever they are used."""

    selects: Callable[[str, bool], bool]  # by the module's full name, and whether it lies in a block
    rounded: Callable[[str, int | None, Tensor], tuple[Tensor, QuantizedModule]]
    """Module, layer, weight (…, d_out, d_in) → the weight that runs, and what a report says of it."""


@dataclass(frozen=True)
class Running:
    """In which precision a checkpoint runs: at most one of `packing` and `latent`."""

    packing: Packing | None = None
    latent: Latent | None = None
    activation: Rounding | None = None  # of what enters the quantised linear maps


AS_STORED = Running()


def round_inputs(module: nn.Module, rounding: Rounding) -> None:
    """From now on the inputs (…, d_in) of a linear map go through `rounding` first."""
    if isinstance(module, (nn.Linear, Conv1D)):
        module.register_forward_pre_hook(lambda _, args: (rounding(args[0]), *args[1:]))
