"""Weights to scheme members and back, and the straight-through version through which references are trained.

Layouts of weights and scales are those of `groups`; `scale` is always the step size. Integer schemes may have zero
points, whole codes in the layout of the scales, which stand for weight 0: w = scale · (code − zero_point). All
arithmetic is at least float32, whatever the weights are stored in. With `fp` everything here is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peelcli.quant.groups import check_finite, check_weight, expand_scale
from peelcli.quant.initial_scale import initial_scale
from peelcli.quant.kernels.choice import triton_serves
from peelcli.quant.levels import codes_of, levels_of, nearest_levels
from peelcli.quant.schemes import Scheme, scheme_named
from peelcli.records.quant_spec import QuantSpec

__all__ = ["dequantize", "fake_quantize", "initial_scale", "quantize"]


def quantize(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Codes (int8, the shape of `weight`) of the nearest scheme members; `weight` itself for `fp`.

    Where a scale is 0 so are the codes (+1 with `binary`, which has no zero; times that scale it is still 0).
    CheckpointError for weights that are not linear or not finite, ArtefactError for a scale of another shape.
    """
    scheme = scheme_named(spec.scheme)
    if scheme.is_free:
        return weight
    check_finite(weight)
    check_finite(scale, "scale")
    zero = None if zero_point is None else expand_scale(zero_point, weight.shape, spec)
    levels = _levels(weight, _ratio(weight, scale, spec), scheme, zero)
    return codes_of(levels if zero is None else levels + zero, scheme)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    dtype: torch.dtype = torch.float32,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Weights, level times scale, of `dtype`; for `fp` the codes are the weights already."""
    scheme = scheme_named(spec.scheme)
    if scheme.is_free:
        return codes.to(dtype)
    expanded = expand_scale(scale, codes.shape, spec)
    levels = levels_of(codes, scheme, torch.promote_types(scale.dtype, torch.float32))
    if zero_point is not None:
        levels = levels - expand_scale(zero_point, codes.shape, spec)
    return _product(levels, expanded, dtype)


def fake_quantize(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    zero_point: Tensor | None = None,
) -> Tensor:
    """`dequantize(quantize(weight))`, exactly, in the dtype of `weight`, with gradients to weight and scale.

    With r = weight / scale and c its level, the gradients are those of learned step size quantisation (Esser
    et al., arXiv 1902.08153), without the constant factor that it puts on the scale's:

        d out / d weight = 1 where r is in range, else 0
        d out / d scale = c − r where r is in range, else c

    In range is what lies at most half a gap beyond the outermost levels, more than in that paper: weights that lie
    on those, as the weights of a low-bit checkpoint do, would otherwise be shut out by a rounding of r.
    `binary` passes to the weight everywhere, so that every sign can still flip; its scale gets c, the true
    slope. A scale may be trained to any value; below 0 it mirrors the levels. At 0 its group is 0 and, but
    for `binary`, stays so: the scale gets no gradient. NaN and infinity come out as NaN.
    """
    scheme = scheme_named(spec.scheme)
    if scheme.is_free:
        return weight
    if zero_point is None and triton_serves(weight, scale):  # the kernel knows none
        check_weight(weight)
        expand_scale(scale, weight.shape, spec)  # raises where the two do not belong together
        scale = scale.expand(
            *weight.shape[:-1], scale.shape[-1]
        )  # one step for the matrix is one for each row
        from peelcli.quant.kernels import triton_fake_quantize

        width = spec.group_width(weight.shape[-1])
        return triton_fake_quantize.fake_quantize(weight, scale, scheme.levels, scheme.reach, width)
    return eager_fake_quantize(weight, scale, spec, zero_point)


def eager_fake_quantize(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    zero_point: Tensor | None = None,
) -> Tensor:
    """As `fake_quantize`, in plain torch: what a kernel must equal."""
    scheme = scheme_named(spec.scheme)
    ratio = _ratio(weight, scale, spec).detach()
    zero = None if zero_point is None else expand_scale(zero_point, weight.shape, spec)
    levels = _levels(weight.detach(), ratio, scheme, zero)
    expanded = expand_scale(scale, weight.shape, spec)
    value = _product(levels, expanded.detach(), weight.dtype)
    if scheme.name == "binary":
        slope, surrogate = levels, weight
    else:
        low, high = scheme.reach
        moved = ratio if zero is None else ratio + zero
        inside = (moved >= low) & (moved <= high)
        slope = torch.where(inside, levels - ratio, levels)
        surrogate = torch.where(inside, weight, weight.detach())
    # A linear function with the slopes above; less itself it is exactly 0 (NaN for NaN), so the value stands.
    surrogate = surrogate + slope * expanded
    return value + (surrogate - surrogate.detach()).to(weight.dtype)


def _ratio(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    check_weight(weight)
    expanded = expand_scale(scale, weight.shape, spec)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, scale.dtype), torch.float32)
    expanded = expanded.to(dtype)
    return weight.to(dtype) / torch.where(expanded == 0, torch.inf, expanded)  # scale 0: w / inf = 0, no NaN


def _levels(weight: Tensor, ratio: Tensor, scheme: Scheme, zero: Tensor | None) -> Tensor:
    """The level next to each weight; with zero points a whole number, the code less them."""
    if zero is not None:
        return ratio.round().clamp(scheme.qmin - zero, scheme.qmax - zero)
    # Of `binary` the sign, which does not depend on the step.
    return nearest_levels(weight.to(ratio.dtype) if scheme.name == "binary" else ratio, scheme)


def _product(levels: Tensor, expanded: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(expanded.dtype, torch.float32)
    return (levels.to(wide) * expanded.to(wide)).to(dtype)
