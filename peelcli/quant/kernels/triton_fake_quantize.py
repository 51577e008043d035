"""Fake quantisation for CUDA, forward and backward in one pass each: `quant.fake_quantize` is what it must equal.

The eager version reads and writes the weight a dozen times each way. Here a program holds one group of one channel (or
a piece of a long one) in registers; the backward pass sums the gradient of the group's scale as it goes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peelcli.quant.kernels.eager import are_even
from peelcli.quant.kernels.triton_descent import _nearest_listed, _nearest_whole

PIECE = 1024  # weights at a time
WHOLE, SIGN, LISTED = 0, 1, 2  # how a level is found: by rounding, by the sign, in a table


@triton.jit
def _level(ratio, value, levels, num_levels, low, high, KIND: tl.constexpr):
    if KIND == 1:
        return tl.where(value >= 0.0, 1.0, -1.0)
    if KIND == 2:
        return _nearest_listed(ratio, levels, num_levels)
    # NaN stays NaN, since neither bound of a clamp catches it.
    return tl.where(ratio == ratio, _nearest_whole(ratio, low, high), ratio)


@triton.jit
def _forward(
    weight, scale, out, levels, num_levels, d_in, num_groups, group_width, low, high, below, above,
    KIND: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    width = tl.minimum(group_width, d_in - group * group_width)
    step = tl.load(scale + row * num_groups + group).to(tl.float32)
    base = row * d_in + group * group_width
    for start in range(0, width, PIECE):
        at = start + tl.arange(0, PIECE)
        value = tl.load(weight + base + at, mask=at < width, other=0.0).to(tl.float32)
        ratio = tl.where(step == 0.0, value * 0.0, value / tl.where(step == 0.0, 1.0, step))
        level = _level(ratio, value, levels, num_levels, low, high, KIND)
        shown = tl.where(value == value, level * step, value)
        tl.store(out + base + at, shown.to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _backward(
    weight, scale, upstream, d_weight, d_scale, levels, num_levels,
    d_in, num_groups, group_width, low, high, below, above, KIND: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    width = tl.minimum(group_width, d_in - group * group_width)
    step = tl.load(scale + row * num_groups + group).to(tl.float32)
    base = row * d_in + group * group_width
    total = tl.zeros((PIECE,), tl.float32)
    for start in range(0, width, PIECE):
        at = start + tl.arange(0, PIECE)
        value = tl.load(weight + base + at, mask=at < width, other=0.0).to(tl.float32)
        gradient = tl.load(upstream + base + at, mask=at < width, other=0.0).to(tl.float32)
        ratio = tl.where(step == 0.0, value * 0.0, value / tl.where(step == 0.0, 1.0, step))
        level = _level(ratio, value, levels, num_levels, low, high, KIND)
        if KIND == 1:
            slope, passed = level, gradient
        else:
            inside = (ratio >= below) & (ratio <= above)
            slope, passed = tl.where(inside, level - ratio, level), tl.where(inside, gradient, 0.0)
        total += gradient * slope
        tl.store(d_weight + base + at, passed.to(d_weight.dtype.element_ty), mask=at < width)
    tl.store(d_scale + row * num_groups + group, tl.sum(total, axis=0).to(d_scale.dtype.element_ty))


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, levels: Tensor, size: int, ends: tuple[float, ...], kind: int
    ) -> Tensor:
        weight, scale = weight.contiguous(), scale.contiguous()
        ctx.save_for_backward(weight, scale, levels)
        ctx.rule = (len(levels), weight.shape[-1], scale.shape[-1], size, *ends)
        ctx.kind = kind
        out = torch.empty_like(weight)
        rows = weight.numel() // weight.shape[-1]
        _forward[(scale.shape[-1], rows)](weight, scale, out, levels, *ctx.rule, KIND=kind, PIECE=PIECE)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale, levels = ctx.saved_tensors
        d_weight, d_scale = torch.empty_like(weight), torch.empty_like(scale)
        rows = weight.numel() // weight.shape[-1]
        _backward[(scale.shape[-1], rows)](
            weight,
            scale,
            upstream.contiguous(),
            d_weight,
            d_scale,
            levels,
            *ctx.rule,
            KIND=ctx.kind,
            PIECE=PIECE,
        )
        return d_weight, d_scale, None, None, None, None


@lru_cache(maxsize=64)  # a copy to a GPU waits for it
def _table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=device)


def fake_quantize(
    weight: Tensor,
    scale: Tensor,
    levels: tuple[float, ...],
    reach: tuple[float, float],
    width: int | None = None,
) -> Tensor:
    """`weight` (…, d_out, d_in) at the levels next to it, in its dtype, with gradients to it and to `scale`.

    scale: (…, d_out, n_groups). levels: 256 at most, ascending; (−1, 1) take the sign. reach: of the weights, in units
    of their scale, that get a gradient.
    """
    size = weight.shape[-1] if width is None else width
    kind = SIGN if levels == (-1, 1) else WHOLE if are_even(levels) else LISTED
    ends = (float(levels[0]), float(levels[-1]), *reach)
    return _FakeQuantize.apply(weight, scale, _table(levels, weight.device), size, ends, kind)
