"""Training with ternary or binary weights: straight-through fake quantisation of the matrices of the blocks.

One scale per output channel, mean |w|. Ternary: w/scale rounded and clipped to −1, 0, 1; binary: its sign. BitNet:
ternary, one scale per matrix, and inputs of 8 bits per token, by the modules that transformers itself runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.integrations.bitnet import replace_with_bitnet_linear


class Quantized(nn.Module):
    """A weight on the grid in the forward pass, its latent value in the backward pass."""

    def __init__(self, precision: str, transposed: bool) -> None:
        super().__init__()
        self.binary, self.dim = precision == "binary", 0 if transposed else 1

    def forward(self, weight: Tensor) -> Tensor:
        """weight (d_out, d_in), or transposed."""
        scale = weight.abs().mean(self.dim, keepdim=True)
        codes = torch.where(weight >= 0, 1.0, -1.0) if self.binary else (weight / scale).round().clamp(-1, 1)
        # Adding the weight first and taking it off again would leave its rounding in the values of the grid.
        return (weight - weight.detach()) + (codes * scale).detach()


@contextmanager
def low_bit(blocks: nn.ModuleList, precision: str) -> Iterator[None]:
    """For the length of the context the matrices of the blocks are `precision`; at the end they hold what they were."""
    chosen: list[nn.Module] = []
    if precision in ("ternary", "binary"):
        conv = transformers.pytorch_utils.Conv1D
        chosen = [m for m in blocks.modules() if isinstance(m, (nn.Linear, conv))]
        for module in chosen:
            rule = Quantized(precision, isinstance(module, conv))
            parametrize.register_parametrization(module, "weight", rule, unsafe=True)
    try:
        yield
    finally:
        for module in chosen:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def bit_linear(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model with BitNet's maps in its blocks; they hold latent weights, and are saved and opened so."""
    config = transformers.BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    latent = model.state_dict()
    replace_with_bitnet_linear(model, ["lm_head"], config)
    model.load_state_dict(latent, assign=True)
    model.config.quantization_config = config
    return model
