"""The hot functions of the direct solver in plain torch: the specification of any kernel of the same signature.

All speak of a linear map with quadratic loss. A row w (d_in,) of the weight that should be t costs

    f(w) = (w − t) H (w − t)ᵀ        w_j = scale_g · (code_j − zero_point_g),  g the group of column j

and rows do not depend on each other, so that they are worked on side by side, one column after the other.

    codes       (d_out, d_in) floating: each entry one of `levels`
    scale       (d_out, n_groups)
    zero_point  (d_out, n_groups) in units of a level, not necessarily whole; None where it is 0 throughout
    target      (d_out, d_in)
    hessian     (d_in, d_in) symmetric, positive semidefinite: Σ x xᵀ over the inputs, damped
    levels      (n_levels,) ascending, not necessarily evenly spaced
    group_of    (d_in,) int64: the group of each column; columns may stand in any order

Tensors of one call share dtype and device. Descent leaves codes alone where their scale is 0, and in columns with
nothing on the diagonal of the hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK = 64  # columns whose changes reach the others in one matrix product


def rounding(levels: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from ratios of any shape to the level next to each; halves go to the even one of whole levels."""
    listed = levels.tolist()
    if are_even(listed):
        return lambda ratio: ratio.round().clamp_(listed[0], listed[-1])
    middles = (levels[1:] + levels[:-1]) / 2
    return lambda ratio: levels[torch.bucketize(ratio.contiguous(), middles)]


def are_even(levels: Sequence[float]) -> bool:
    """Whether ascending levels lie one apart, so that rounding finds them (no codebook, and not ±1)."""
    return len(levels) > 1 and all(high - low == 1 for low, high in zip(levels, levels[1:], strict=False))


def weight_of(codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_of: Tensor) -> Tensor:
    """The weight (d_out, d_in) that codes, scale and zero point stand for."""
    shifted = codes if zero_point is None else codes - spread(zero_point, group_of)
    return shifted * spread(scale, group_of)


def spread(steps: Tensor, group_of: Tensor) -> Tensor:
    """Scales or zero points (d_out, n_groups) for each column: (d_out, d_in), or (d_out, 1) where all share one."""
    return steps if steps.shape[1] == 1 else steps.index_select(1, group_of)


def gradient_of(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    target: Tensor,
    hessian: Tensor,
    group_of: Tensor,
) -> Tensor:
    """(w − t) H (d_out, d_in), half the gradient of f: what descent and rescaling go by, and keep true."""
    return (weight_of(codes, scale, zero_point, group_of) - target) @ hessian


def coordinate_descent_(
    codes: Tensor,
    scale: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    levels: Tensor,
    group_of: Tensor,
) -> Tensor:
    """One sweep over the columns in their order: each code to the level that costs least while the others stay.

    A code is changed only where that lowers f, so f never rises. `gradient` is that of `gradient_of`, before and after.
    Returns how many codes of each row were changed (d_out,), int64; a row with none is where no change of a single code
    lowers f.
    """
    d_out, d_in = codes.shape
    nearest = rounding(levels)
    changed = torch.zeros(d_out, dtype=torch.int64, device=codes.device)
    curvature = hessian.diagonal()
    slopes = gradient.T.contiguous()  # a column of the weight is a row in memory
    delta, bend = torch.empty_like(slopes[0]), torch.empty_like(slopes[0])
    for start in range(0, d_in, BLOCK):
        here = slice(start, min(start + BLOCK, d_in))
        slope = slopes[here].clone()  # (width, d_out)
        old = codes[:, here].T.contiguous()
        before = old.clone()
        step = scale[:, group_of[here]].T.contiguous()
        movable = (step != 0) & (curvature[here, None] > 0)
        inverse = torch.where(movable, -(step * curvature[here, None]).reciprocal(), 0.0)
        local = hessian[here, here]
        moved = torch.empty_like(slope)
        for j in range(len(slope)):
            lowest = slope[j].mul_(inverse[j])  # from the code to the lowest point along this coordinate
            new = nearest(torch.add(old[j], lowest))
            torch.sub(new, old[j], out=delta)
            # Along the coordinate f changes by step² · curvature · delta · (delta − 2 lowest).
            better = torch.add(delta, lowest, alpha=-2, out=bend).mul_(delta) < 0
            torch.where(better, new, old[j], out=old[j])
            torch.mul(delta.mul_(better), step[j], out=moved[j])
            slope[j + 1 :].addr_(local[j, j + 1 :], moved[j])
        changed += (old != before).sum(0)
        codes[:, here] = old.T
        slopes.addmm_(hessian[:, here], moved)
    gradient.copy_(slopes.T)
    return changed


def rescale_(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    gradient: Tensor,
    hessian: Tensor,
    group_of: Tensor,
) -> None:
    """Each scale, and zero point where there is one, to the value that costs least while all else stays; in turn.

    With one group to a row that is the row's optimum; with more it is one round of coordinate descent over them.
    `gradient` is that of `gradient_of`, before and after.
    """
    for g in range(scale.shape[1]):
        columns = (group_of == g).nonzero().squeeze(-1)
        rows = hessian.index_select(0, columns)  # (width, d_in)
        direction = codes.index_select(1, columns)
        if zero_point is not None:
            direction = direction - zero_point[:, g, None]
        scale[:, g] += _line_search_(gradient, direction, rows, columns)
        if zero_point is not None:
            direction = -scale[:, g, None].expand(-1, len(columns))
            zero_point[:, g] += _line_search_(gradient, direction, rows, columns)


def _line_search_(gradient: Tensor, direction: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """How far (d_out,) along `direction` (d_out, width) f is lowest; `gradient` (d_out, d_in) is what it is there."""
    change = direction @ rows  # (d_out, d_in)
    curvature = (change.index_select(1, columns) * direction).sum(-1)
    slope = (gradient.index_select(1, columns) * direction).sum(-1)
    length = torch.where(curvature > 0, -slope / curvature.clamp_min(torch.finfo(slope.dtype).tiny), 0.0)
    gradient.addcmul_(length.unsqueeze(-1), change)
    return length


def round_with_feedback(
    scale: Tensor,
    zero_point: Tensor | None,
    target: Tensor,
    factor: Tensor,
    levels: Tensor,
    group_of: Tensor,
) -> Tensor:
    """Codes (d_out, d_in): each column rounded in turn, its error made good by the columns still to come.

    The codes of GPTQ (Frantar et al., arXiv 2210.17323) without the inverse of H: with H = R Rᵀ, `factor` R of
    `upper_factor`, f is the squared length of (w − t) R, whose component k depends on the columns up to k alone; so
    each column is rounded next to where it makes its own component zero.
    """
    d_in = target.shape[1]
    nearest = rounding(levels)
    coupling = factor / factor.diagonal()
    codes = torch.empty_like(target)
    goals = target.T.contiguous()  # a column of the weight is a row in memory
    wanted = goals.clone()
    for start in range(0, d_in, BLOCK):
        here = slice(start, min(start + BLOCK, d_in))
        goal, want = goals[here], wanted[here]  # (width, d_out)
        step = scale[:, group_of[here]].T.contiguous()
        inverse = torch.where(step == 0, 0.0, step.reciprocal())
        zero = None if zero_point is None else zero_point[:, group_of[here]].T.contiguous()
        local, taken, error = coupling[here, here], torch.empty_like(want), torch.empty_like(want)
        for j in range(len(want)):
            ratio = want[j] * inverse[j]
            code = taken[j] = nearest(ratio if zero is None else ratio.add_(zero[j]))
            value = code if zero is None else code - zero[j]
            torch.addcmul(goal[j], value, step[j], value=-1, out=error[j])
            want[j + 1 :].addr_(local[j, j + 1 :], error[j])
        codes[:, here] = taken.T
        wanted[here.stop :].addmm_(coupling[here, here.stop :].T, error)
    return codes


def upper_factor(hessian: Tensor) -> Tensor:
    """R (d_in, d_in), upper triangular, with H = R Rᵀ; found in double precision.

    `hessian` must be positive definite; torch.linalg.LinAlgError where it is not.
    """
    lower: Tensor = torch.linalg.cholesky(hessian.flip(0, 1).double())
    return lower.to(hessian.dtype).flip(0, 1)
