"""The steps and zero points that a fit starts from, by a rule that has one vocabulary for all schemes."""

from __future__ import annotations

import torch
from torch import Tensor

from peelcli.errors import UsageError
from peelcli.quant.fake_quantize import dequantize, quantize
from peelcli.quant.groups import check_finite, check_weight, scale_shape, split_groups
from peelcli.quant.initial_scale import start_scale
from peelcli.quant.schemes import Scheme, scheme_named
from peelcli.records.quant_spec import QuantSpec

_CLIP_RATIOS = torch.linspace(0.35, 1.0, 20).tolist()


@torch.no_grad()
def initial_qparams(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scales (…, d_out, n_groups), or (…, 1, 1) for granularity `tensor`, and zero points of that shape, if any.

    Symmetric: `start_scale`, and None. Else absmax: the least and the largest weight, and 0, lie within the outermost
    levels. mse: the best of many such ranges and of no zero point, so never worse than either.
    CheckpointError for weights that are not linear or not finite.
    UsageError where the scale rule does not fit the scheme.
    """
    scheme = scheme_named(spec.scheme)
    if spec.symmetric or scheme.is_free:
        return start_scale(weight, spec), None
    if not scheme.name.startswith("int") or spec.scale == "absmean":
        raise UsageError(
            f"zero points: expected an integer scheme and the scale rule absmax or mse, found {scheme.name} and "
            f"{spec.scale}; choose such or leave the scheme symmetric"
        )
    check_weight(weight)
    check_finite(weight)
    value = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if spec.is_per_tensor:
        value = value.reshape(*value.shape[:-2], 1, -1)
    shape = scale_shape(value.shape, spec)
    # (n, width). A short group is filled up with 0, which lies in any range.
    groups, _ = split_groups(value, spec)
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    scale, zero = _range_steps(low, high, scheme)  # (n, 1)
    if spec.scale == "mse":
        error = _error(groups, scale, zero, scheme)
        symmetric = start_scale(groups, QuantSpec(spec.scheme))
        others = [(symmetric, torch.zeros_like(zero))]
        others += [_range_steps(low * clip, high * clip, scheme) for clip in _CLIP_RATIOS]
        for other_scale, other_zero in others:
            other = _error(groups, other_scale, other_zero, scheme)
            better = other < error
            scale, zero = torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)
            error = torch.where(better, other, error)
    return scale.reshape(shape), zero.reshape(shape)


def _range_steps(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    scale = (high - low) / (scheme.qmax - scheme.qmin)
    zero = (scheme.qmin - low / torch.where(scale == 0, torch.inf, scale)).round()
    return scale, zero.clamp(scheme.qmin, scheme.qmax)


def _error(groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    whole = QuantSpec(scheme.name)
    codes = quantize(groups, scale, whole, zero)
    rounded = dequantize(codes, scale, whole, groups.dtype, zero)
    return (rounded - groups).square().sum(-1, keepdim=True)
