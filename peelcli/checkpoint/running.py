"""How stored tensors become the weights that run, for packed and latent weights.

The quantisation itself is passed in as functions. This package knows where a weight is stored and its name, and
contains no quantisation arithmetic.
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
    """Latent weights: stored in full precision and rounded whenever they are used."""

    selects: Callable[[str, bool], bool]  # (module's full name, whether it is in a block) → is it rounded?
    rounded: Callable[[str, int | None, Tensor], tuple[Tensor, QuantizedModule]]
    """(module, layer, weight (…, d_out, d_in)) → the rounded weight, and the record of how it is quantised."""


@dataclass(frozen=True)
class Running:
    """The precision in which a checkpoint runs. At most one of `packing` and `latent` is set."""

    packing: Packing | None = None
    latent: Latent | None = None
    activation: Rounding | None = None  # rounds the inputs of quantised linear maps


AS_STORED = Running()


def round_inputs(module: nn.Module, rounding: Rounding) -> None:
    """Register a hook that applies `rounding` to the inputs (…, d_in) of a linear map."""
    if isinstance(module, (nn.Linear, Conv1D)):
        module.register_forward_pre_hook(lambda _, args: (rounding(args[0]), *args[1:]))
