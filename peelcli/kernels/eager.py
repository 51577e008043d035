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

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 64  # columns whose changes reach the others in one matrix product


def rounding(levels: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from ratios of any shape to the level next to each; halves go to the even one of whole levels."""
    if len(levels) > 1 and bool((levels.diff() == 1).all()):
        low, high = float(levels[0]), float(levels[-1])
        return lambda ratio: ratio.round().clamp_(low, high)
    middles = (levels[1:] + levels[:-1]) / 2
    return lambda ratio: levels[torch.bucketize(ratio.contiguous(), middles)]


def weight_of(codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_of: Tensor) -> Tensor:
    """The weight (d_out, d_in) that codes, scale and zero point stand for."""
    shifted = codes if zero_point is None else codes - zero_point[:, group_of]
    return shifted * scale[:, group_of]


def coordinate_descent_(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    target: Tensor,
    hessian: Tensor,
    levels: Tensor,
    group_of: Tensor,
) -> Tensor:
    """One sweep over the columns in their order: each code to the level that costs least while the others stay.

    A code is changed only where that lowers f, so f never rises. Returns how many codes of each row were changed
    (d_out,), int64; a row with none is where no change of a single code lowers f.
    """
    d_in = target.shape[1]
    nearest = rounding(levels)
    changed = torch.zeros(len(target), dtype=torch.int64, device=target.device)
    curvature = hessian.diagonal()
    curvature = torch.where(curvature > 0, curvature, torch.inf)  # no curvature, no move
    gradient = (weight_of(codes, scale, zero_point, group_of) - target) @ hessian  # half of that of f
    for start in range(0, d_in, BLOCK):
        here = slice(start, min(start + BLOCK, d_in))
        slope = gradient[:, here].T.contiguous()  # (width, d_out): a column of the weight is a row in memory
        old = codes[:, here].T.contiguous()
        step = scale[:, group_of[here]].T.contiguous()
        divisor = torch.where(step == 0, torch.inf, step) * curvature[here, None]
        local = hessian[here, here]
        moved = torch.zeros_like(slope)
        for j in range(len(slope)):
            new = nearest(
                old[j] - slope[j] / divisor[j]
            )  # the level next to the lowest point along this coordinate
            move = (new - old[j]) * step[j]
            better = move * (2 * slope[j] + local[j, j] * move) < 0
            moved[j] = torch.where(better, move, 0.0)
            old[j] = torch.where(better, new, old[j])
            changed += better
            slope[j + 1 :].addr_(local[j, j + 1 :], moved[j])
        codes[:, here] = old.T
        gradient[:, here.stop :] += moved.T @ hessian[here, here.stop :]
    return changed


def rescale_(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    target: Tensor,
    hessian: Tensor,
    group_of: Tensor,
) -> None:
    """Each scale, and zero point where there is one, to the value that costs least while all else stays; in turn.

    With one group to a row that is the row's optimum; with more it is one round of coordinate descent over them.
    """
    gradient = (weight_of(codes, scale, zero_point, group_of) - target) @ hessian
    for g in range(scale.shape[1]):
        columns = (group_of == g).nonzero().squeeze(-1)
        rows = hessian[columns]  # (width, d_in)
        direction = codes[:, columns]
        if zero_point is not None:
            direction = direction - zero_point[:, g, None]
        scale[:, g] += _line_search_(gradient, direction, rows, columns)
        if zero_point is not None:
            direction = -scale[:, g, None].expand(-1, len(columns))
            zero_point[:, g] += _line_search_(gradient, direction, rows, columns)


def _line_search_(gradient: Tensor, direction: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """How far (d_out,) along `direction` (d_out, width) f is lowest; `gradient` (d_out, d_in) is what it is there."""
    change = direction @ rows  # (d_out, d_in)
    curvature = (change[:, columns] * direction).sum(-1)
    slope = (gradient[:, columns] * direction).sum(-1)
    length = torch.where(curvature > 0, -slope / curvature.clamp_min(torch.finfo(slope.dtype).tiny), 0.0)
    gradient += length.unsqueeze(-1) * change
    return length


def round_with_feedback(
    scale: Tensor,
    zero_point: Tensor | None,
    target: Tensor,
    hessian: Tensor,
    levels: Tensor,
    group_of: Tensor,
) -> Tensor:
    """Codes (d_out, d_in): each column rounded in turn, its error made good by the columns still to come.

    GPTQ (Frantar et al., arXiv 2210.17323): what is left is put where a free weight would do best, by the Cholesky
    factor of H⁻¹. `hessian` must be positive definite; torch.linalg.LinAlgError where it is not.
    """
    d_in = target.shape[1]
    nearest = rounding(levels)
    factor = inverse_factor(hessian)
    codes = torch.empty_like(target)
    left = target.clone()
    for start in range(0, d_in, BLOCK):
        here = slice(start, min(start + BLOCK, d_in))
        weight = left[:, here].T.contiguous()  # (width, d_out)
        step = scale[:, group_of[here]].T.contiguous()
        divisor = torch.where(step == 0, torch.inf, step)
        zero = None if zero_point is None else zero_point[:, group_of[here]].T.contiguous()
        local, taken, error = factor[here, here], torch.empty_like(weight), torch.empty_like(weight)
        for j in range(len(weight)):
            ratio = weight[j] / divisor[j]
            taken[j] = nearest(ratio if zero is None else ratio + zero[j])
            value = taken[j] if zero is None else taken[j] - zero[j]
            error[j] = (value * step[j] - weight[j]) / local[j, j]
            weight[j + 1 :].addr_(local[j, j + 1 :], error[j])
        codes[:, here] = taken.T
        left[:, here.stop :] += error.T @ factor[here, here.stop :]
    return codes


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of H⁻¹ (d_in, d_in), by way of double precision."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    return torch.linalg.cholesky(inverse, upper=True).to(hessian.dtype)
