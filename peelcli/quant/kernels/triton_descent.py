"""Descent and rounding with feedback for CUDA: a block of columns in a kernel, what it does to the rest in a product.

A program holds some rows of a block of columns in registers and walks through its columns; rows do not depend on each
other. The eager versions launch up to a dozen operations a column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peelcli.quant.kernels.eager import are_even

BLOCK = 64  # columns a program walks through; 32 rows of them fill the registers of four warps
ROWS = 32


@triton.jit
def _nearest_whole(ratio, low, high):
    """The whole number next to `ratio` from low to high; halves go to the even one."""
    ratio = tl.minimum(tl.maximum(ratio, low - 1.0), high + 1.0)
    floor = tl.floor(ratio)
    rest = ratio - floor  # exact, where the sum of ratio and a half would not be
    odd = floor - 2.0 * tl.floor(floor * 0.5)
    up = (rest > 0.5) | ((rest == 0.5) & (odd > 0.5))
    return tl.minimum(tl.maximum(tl.where(up, floor + 1.0, floor), low), high)


@triton.jit
def _nearest_listed(ratio, levels, num_levels):
    """The one of the ascending `levels` (256 at most) next to `ratio`; half-way between two, the lower."""
    found = (tl.zeros_like(ratio)).to(tl.int32)
    for bit in range(8):  # at most 256 levels: a binary search, whose steps are few
        there = found + (128 >> bit)
        inside = there < num_levels
        below = tl.load(levels + there - 1, mask=inside, other=0.0)
        level = tl.load(levels + there, mask=inside, other=0.0)
        found = tl.where(inside & (ratio > (level + below) / 2), there, found)
    return tl.load(levels + found)


@triton.jit
def _walk(
    codes, gradient, moved, changed, scale, hessian, levels, group_of,
    d_out, d_in, start, width, num_groups, num_levels, low, high,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns from `start` on, for ROWS rows: codes in place, `moved` (d_out, BLOCK) what they moved by."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < d_out)[:, None] & (columns < width)[None, :]
    at = rows[:, None].to(tl.int64) * d_in + start + columns[None, :]
    slope = tl.load(gradient + at, mask=inside, other=0.0)  # (ROWS, BLOCK)
    old = tl.load(codes + at, mask=inside, other=0.0)
    group = tl.load(group_of + start + columns, mask=columns < width, other=0)
    step = tl.load(scale + rows[:, None].to(tl.int64) * num_groups + group[None, :], mask=inside, other=0.0)
    moves = tl.zeros((ROWS, BLOCK), tl.float32)
    count = tl.zeros((ROWS,), tl.int64)
    for j in range(width):
        here = (columns == j)[None, :]
        # A column out of registers: the only one that is not masked is summed.
        slope_j = tl.sum(tl.where(here, slope, 0.0), axis=1)
        old_j = tl.sum(tl.where(here, old, 0.0), axis=1)
        step_j = tl.sum(tl.where(here, step, 0.0), axis=1)
        row = (start + j).to(tl.int64) * d_in + start
        after = (columns > j) & (columns < width)
        coupling = tl.load(hessian + row + columns, mask=after, other=0.0)  # (BLOCK,)
        curvature = tl.load(hessian + row + j)
        steep = step_j * tl.maximum(curvature, 0.0)  # 0: no step, or no curvature, and so no move
        lowest = tl.where(steep != 0.0, -slope_j * (1.0 / tl.where(steep != 0.0, steep, 1.0)), 0.0)
        ratio = old_j + lowest  # the lowest point along this coordinate
        new = _nearest_whole(ratio, low, high) if WHOLE else _nearest_listed(ratio, levels, num_levels)
        better = (new - old_j) * (new - old_j - 2.0 * lowest) < 0.0
        move = tl.where(better, (new - old_j) * step_j, 0.0)
        count += better.to(tl.int64)
        old = tl.where(here, tl.where(better, new, old_j)[:, None], old)
        moves = tl.where(here, move[:, None], moves)
        slope += move[:, None] * coupling[None, :]
    tl.store(codes + at, old, mask=inside)
    tl.store(
        moved + rows[:, None].to(tl.int64) * BLOCK + columns[None, :], moves, mask=(rows < d_out)[:, None]
    )
    seen = tl.load(changed + rows, mask=rows < d_out, other=0)
    tl.store(changed + rows, seen + count, mask=rows < d_out)


@triton.jit
def _feed(
    codes, goal, wanted, errors, scale, zero_point, coupling, levels, group_of,
    d_out, d_in, start, width, num_groups, num_levels, low, high,
    WHOLE: tl.constexpr, SHIFTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns from `start` on, for ROWS rows: codes, and the errors (d_out, BLOCK) left to the rest."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < d_out)[:, None] & (columns < width)[None, :]
    at = rows[:, None].to(tl.int64) * d_in + start + columns[None, :]
    want = tl.load(wanted + at, mask=inside, other=0.0)  # (ROWS, BLOCK)
    right = tl.load(goal + at, mask=inside, other=0.0)
    group = tl.load(group_of + start + columns, mask=columns < width, other=0)
    place = rows[:, None].to(tl.int64) * num_groups + group[None, :]
    step = tl.load(scale + place, mask=inside, other=0.0)
    zero = tl.zeros((ROWS, BLOCK), tl.float32)
    if SHIFTED:
        zero = tl.load(zero_point + place, mask=inside, other=0.0)
    taken = tl.zeros((ROWS, BLOCK), tl.float32)
    left = tl.zeros((ROWS, BLOCK), tl.float32)
    for j in range(width):
        here = (columns == j)[None, :]
        want_j = tl.sum(tl.where(here, want, 0.0), axis=1)
        step_j = tl.sum(tl.where(here, step, 0.0), axis=1)
        zero_j = tl.sum(tl.where(here, zero, 0.0), axis=1)
        right_j = tl.sum(tl.where(here, right, 0.0), axis=1)
        after = (columns > j) & (columns < width)
        spread = tl.load(
            coupling + (start + j).to(tl.int64) * d_in + start + columns, mask=after, other=0.0
        )  # (BLOCK,)
        ratio = tl.where(step_j != 0.0, want_j * (1.0 / tl.where(step_j != 0.0, step_j, 1.0)), 0.0) + zero_j
        code = _nearest_whole(ratio, low, high) if WHOLE else _nearest_listed(ratio, levels, num_levels)
        error = right_j - (code - zero_j) * step_j
        taken = tl.where(here, code[:, None], taken)
        left = tl.where(here, error[:, None], left)
        want += error[:, None] * spread[None, :]
    tl.store(codes + at, taken, mask=inside)
    tl.store(
        errors + rows[:, None].to(tl.int64) * BLOCK + columns[None, :], left, mask=(rows < d_out)[:, None]
    )


def round_with_feedback(
    scale: Tensor,
    zero_point: Tensor | None,
    target: Tensor,
    factor: Tensor,
    levels: Tensor,
    group_of: Tensor,
) -> Tensor:
    """As `eager.round_with_feedback`; float32 throughout."""
    d_out, d_in = target.shape
    coupling = (factor / factor.diagonal()).contiguous()
    scale, goal = scale.contiguous(), target.contiguous()
    zeros = scale if zero_point is None else zero_point.contiguous()
    wanted, codes = goal.clone(), torch.empty_like(goal)
    errors = torch.zeros(d_out, BLOCK, dtype=torch.float32, device=target.device)
    listed = levels.tolist()
    for start in range(0, d_in, BLOCK):
        stop = min(start + BLOCK, d_in)
        _feed[(triton.cdiv(d_out, ROWS),)](
            codes, goal, wanted, errors, scale, zeros, coupling, levels, group_of,
            d_out, d_in, start, stop - start, scale.shape[1], len(listed), listed[0], listed[-1],
            WHOLE=are_even(listed), SHIFTED=zero_point is not None, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        if stop < d_in:
            wanted[:, stop:].addmm_(errors[:, : stop - start], coupling[start:stop, stop:])
    return codes


def coordinate_descent_(
    codes: Tensor,
    scale: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    levels: Tensor,
    group_of: Tensor,
) -> Tensor:
    """As `eager.coordinate_descent_`; float32 throughout."""
    d_out, d_in = codes.shape
    hessian, scale = hessian.contiguous(), scale.contiguous()
    work, slopes = codes.contiguous(), gradient.contiguous()
    changed = torch.zeros(d_out, dtype=torch.int64, device=codes.device)
    moved = torch.zeros(d_out, BLOCK, dtype=torch.float32, device=codes.device)
    listed = levels.tolist()
    for start in range(0, d_in, BLOCK):
        stop = min(start + BLOCK, d_in)
        _walk[(triton.cdiv(d_out, ROWS),)](
            work, slopes, moved, changed, scale, hessian, levels, group_of,
            d_out, d_in, start, stop - start, scale.shape[1], len(listed), listed[0], listed[-1],
            WHOLE=are_even(listed), ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        slopes.addmm_(moved[:, : stop - start], hessian[start:stop])
    if work is not codes:
        codes.copy_(work)
    if slopes is not gradient:
        gradient.copy_(slopes)
    return changed
