"""Fake quantisation for CUDA, forward and backward in one pass each: `quant.fake_quantize` is what it must equal.

The eager version reads and writes the weight a dozen times each way. Here a program holds one group of one channel (or
a piece of a long one) in registers; the backward pass sums the gradient of the group's scale as it goes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peelcli.kernels.triton_descent import _nearest_whole

PIECE = 1024  # weights at a time


@triton.jit
def _forward(
    weight, scale, out, d_in, num_groups, group_size, low, high, BINARY: tl.constexpr, PIECE: tl.constexpr
):
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    width = tl.minimum(group_size, d_in - group * group_size)
    step = tl.load(scale + row * num_groups + group).to(tl.float32)
    base = row * d_in + group * group_size
    for start in range(0, width, PIECE):
        at = start + tl.arange(0, PIECE)
        value = tl.load(weight + base + at, mask=at < width, other=0.0).to(tl.float32)
        if BINARY:
            code = tl.where(value >= 0.0, 1.0, -1.0)
        else:
            # Beside the code's own sake: NaN stays NaN, since neither bound of a clamp catches it.
            ratio = tl.where(step == 0.0, value * 0.0, value / tl.where(step == 0.0, 1.0, step))
            code = tl.where(ratio == ratio, _nearest_whole(ratio, low, high), ratio)
        shown = tl.where(value == value, code * step, value)
        tl.store(out + base + at, shown.to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _backward(
    weight, scale, above, d_weight, d_scale, d_in, num_groups, group_size, low, high,
    BINARY: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    width = tl.minimum(group_size, d_in - group * group_size)
    step = tl.load(scale + row * num_groups + group).to(tl.float32)
    base = row * d_in + group * group_size
    total = tl.zeros((PIECE,), tl.float32)
    for start in range(0, width, PIECE):
        at = start + tl.arange(0, PIECE)
        value = tl.load(weight + base + at, mask=at < width, other=0.0).to(tl.float32)
        gradient = tl.load(above + base + at, mask=at < width, other=0.0).to(tl.float32)
        if BINARY:
            slope, passed = tl.where(value >= 0.0, 1.0, -1.0), gradient
        else:
            ratio = tl.where(step == 0.0, value * 0.0, value / tl.where(step == 0.0, 1.0, step))
            code = tl.where(ratio == ratio, _nearest_whole(ratio, low, high), ratio)
            inside = (ratio >= low - 0.5) & (ratio <= high + 0.5)
            slope, passed = tl.where(inside, code - ratio, code), tl.where(inside, gradient, 0.0)
        total += gradient * slope
        tl.store(d_weight + base + at, passed.to(d_weight.dtype.element_ty), mask=at < width)
    tl.store(d_scale + row * num_groups + group, tl.sum(total, axis=0).to(d_scale.dtype.element_ty))


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, low: float, high: float, size: int, binary: bool
    ) -> Tensor:
        weight, scale = weight.contiguous(), scale.contiguous()
        ctx.save_for_backward(weight, scale)
        ctx.rule = (weight.shape[-1], scale.shape[-1], size, low, high)
        ctx.binary = binary
        out = torch.empty_like(weight)
        rows = weight.numel() // weight.shape[-1]
        _forward[(scale.shape[-1], rows)](weight, scale, out, *ctx.rule, BINARY=binary, PIECE=PIECE)
        return out

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        d_weight, d_scale = torch.empty_like(weight), torch.empty_like(scale)
        rows = weight.numel() // weight.shape[-1]
        _backward[(scale.shape[-1], rows)](
            weight, scale, above.contiguous(), d_weight, d_scale, *ctx.rule, BINARY=ctx.binary, PIECE=PIECE
        )
        return d_weight, d_scale, None, None, None, None


def fake_quantize(
    weight: Tensor, scale: Tensor, levels: tuple[int, ...], group_size: int | None = None
) -> Tensor:
    """`weight` (…, d_out, d_in) at the levels next to it, in its dtype, with gradients to it and to `scale`.

    scale: (…, d_out, n_groups). levels: ascending whole numbers without gaps, or (−1, 1), which take the sign.
    """
    size = weight.shape[-1] if group_size is None else group_size
    return _FakeQuantize.apply(weight, scale, float(levels[0]), float(levels[-1]), size, levels == (-1, 1))
