"""Weights and activations as a quantisation-aware training rounds them in its forward pass.

Sources: BitNet b1.58 (arXiv 2402.17764): ternary, one step for the tensor, mean |w|; activations to 8 bits per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peelcli.quant.fake_quantize import dequantize, quantize
from peelcli.quant.groups import check_finite, check_weight, expand_scale
from peelcli.quant.initial_scale import start_scale
from peelcli.quant.schemes import scheme_named
from peelcli.records.quant_spec import QuantSpec

_LEAST_STEP = 1e-5  # below it BitNet and others stop dividing


@dataclass(frozen=True)
class Rounding:
    """A latent weight as it runs: `weight` has its shape, float32; `scale` (…, n_rows, n_groups) its steps."""

    weight: Tensor
    scale: Tensor
    clipped: float | None  # share of latents more than half a gap beyond the outermost level; None for binary


@torch.no_grad()
def round_latent(weight: Tensor, spec: QuantSpec) -> Rounding:
    """`weight` (…, d_out, d_in) as the forward pass of the training rounded it.

    CheckpointError for weights that are not linear or not finite, UsageError for an unknown scale rule.
    """
    check_weight(weight)
    check_finite(weight)
    value = weight.float()
    scale = start_scale(value, spec)
    if spec.scale == "absmean":
        scale = scale.clamp_min(_LEAST_STEP)
    codes = quantize(value, scale, spec)
    clipped = None
    if spec.scheme != "binary":
        steps = expand_scale(scale, value.shape, spec)
        ratio = value / torch.where(steps == 0, torch.inf, steps)
        low, high = scheme_named(spec.scheme).reach
        outside = (ratio < low) | (ratio > high)
        clipped = float(outside.float().mean())
    rounded = dequantize(codes, scale, spec)
    return Rounding(rounded, scale, clipped)


def round_tokens(x: Tensor, num_bits: int, peak: float, by_inverse: bool = False) -> Tensor:
    """`x` (…, d) rounded to `num_bits`, each token with a step of its own, max |x| / `peak`; gradients pass through.

    In the dtype of `x`; the arithmetic is float32. by_inverse: multiply by the inverse of the step rather than divide
    by it. Values half-way between two levels are common (the first token of a sequence attends to itself alone, to
    small whole numbers), and go one way or the other by this.
    """
    value = x.detach().float()
    largest = value.abs().amax(-1, keepdim=True).clamp_min(_LEAST_STEP)
    step, inverse = largest / peak, peak / largest
    ratio = value * inverse if by_inverse else value / step
    codes = ratio.round().clamp(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)
    rounded = (codes / inverse if by_inverse else codes * step).to(x.dtype)
    # Adding the input first and taking it off again would leave its rounding in the result.
    return rounded + (x - x.detach()) if x.requires_grad else rounded
