"""How weights fall into channels and groups: the one place that knows the layout of scales.

A weight is (d_out, d_in), or (n_experts, d_out, d_in) for stacked experts. Each output channel is cut
along d_in into groups of the spec's `group_size` (the last may be short), or is one group where that is None.
Scales are (…, d_out, n_groups), or (…, 1, 1) where the whole matrix shares one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from peelcli.errors import ArtefactError, CheckpointError, UsageError
from peelcli.records.quant_spec import QuantSpec


def check_weight(weight: Tensor, what: str = "weight") -> None:
    """CheckpointError unless `weight` is floating, not empty, (d_out, d_in) or (n_experts, d_out, d_in)."""
    if weight.ndim not in (2, 3) or not weight.is_floating_point() or weight.numel() == 0:
        raise CheckpointError(
            f"{what}: expected a floating tensor (d_out, d_in) or (n_experts, d_out, d_in), found "
            f"{tuple(weight.shape)} of {weight.dtype}; pass the weight of a linear layer"
        )


def check_finite(weight: Tensor, what: str = "weight") -> None:
    """CheckpointError where `weight` holds NaN or infinity, which no code stands for."""
    if not torch.isfinite(weight).all():
        count = int((~torch.isfinite(weight)).sum())
        raise CheckpointError(
            f"{what}: expected finite values, found {count} of {weight.numel()} NaN or infinite; "
            "leave this layer out, it is broken"
        )


def num_groups(d_in: int, spec: QuantSpec) -> int:
    """Groups per output channel; UsageError where the group size is below 1."""
    size = spec.group_size
    if size is None:
        return 1
    if size < 1:
        raise UsageError(
            f"group size: expected at least 1, or none for whole channels, found {size}; correct it"
        )
    return -(-d_in // size)


def scale_shape(shape: torch.Size, spec: QuantSpec) -> tuple[int, ...]:
    """The shape (…, d_out, n_groups) of the scales of a weight of `shape` (…, d_out, d_in)."""
    return (*shape[:-1], num_groups(shape[-1], spec))


def split_groups(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Groups as rows (n, width), a short last one filled up with zeros, and the true widths (n,)."""
    d_in = weight.shape[-1]
    count = num_groups(d_in, spec)
    width = spec.group_width(d_in)
    widths = torch.full((count,), width, device=weight.device)
    widths[-1] = d_in - (count - 1) * width
    groups = pad(weight, (0, count * width - d_in)).reshape(-1, width)
    return groups, widths.repeat(groups.shape[0] // count)


def expand_scale(scale: Tensor, shape: torch.Size, spec: QuantSpec) -> Tensor:
    """Scales (…, d_out, n_groups) or (…, 1, 1), so that they broadcast against a weight of `shape` (…, d_out, d_in).

    ArtefactError where the scales are not those of such a weight.
    """
    expected = scale_shape(shape, spec)
    whole = (*shape[:-2], 1, 1)
    if tuple(scale.shape) == whole and spec.group_size is None:
        return scale
    if tuple(scale.shape) != expected:
        raise ArtefactError(
            f"scale: expected {expected} for a weight {tuple(shape)} with group size {spec.group_size}, found "
            f"{tuple(scale.shape)}; the scale belongs to another weight or group size, fit again"
        )
    if spec.group_size is None or expected[-1] == 1:
        return scale
    return scale.repeat_interleave(spec.group_size, dim=-1)[..., : shape[-1]]  # (…, d_out, d_in)
