"""The best low-bit weight for a linear map with quadratic loss, solved directly rather than by gradient descent.

Given inputs x with second moment H = Σ x xᵀ and a weight t that maps them to what is wanted, find codes and scales so
that Σ ‖(W − T) x‖² = tr (W − T) H (W − T)ᵀ is small: rounding with error feedback (GPTQ, arXiv 2210.17323) in the order
of the hessian's diagonal, from one or several step sizes; then sweeps of coordinate descent over codes and scales in
turn, until no single code can be changed for the better. Every step but the first can only lower the loss, row by row,
and a row that rounding to nearest serves better is rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peelcli.errors import UsageError
from peelcli.kernels.descent import coordinate_descent_
from peelcli.kernels.eager import rescale_, round_with_feedback, rounding, weight_of
from peelcli.quant.groups import num_groups
from peelcli.quant.initial_scale import start_scale
from peelcli.quant.levels import codes_of, level_table, levels_of
from peelcli.quant.schemes import Scheme

DAMPING = 0.01  # of the mean of the diagonal: what GPTQ adds to it
MAX_SWEEPS = 20
STARTS = (
    1.0,
    0.8,
    1.25,
)  # step sizes to begin with, relative to the one with the least squared error of the weights


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The hessian (d_in, d_in) with `damping` of its mean diagonal added, in units of that mean.

    All zero (no input ever reached the map) it becomes the identity.
    """
    mean = hessian.diagonal().mean()
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return hessian / mean + damping * eye if mean > 0 else eye


def least_squares_target(weight: Tensor, hessian: Tensor, missing: Tensor) -> Tensor:
    """The weight (d_out, d_in) that a low-bit one should come close to where `weight` itself misses what is wanted.

    hessian: Σ x xᵀ (d_in, d_in), damped. missing: Σ (y − W x) xᵀ (d_out, d_in) over the wanted outputs y. The damping
    holds the target to `weight`: with it, (V − target) H (V − target)ᵀ is the loss of V and the pull towards `weight`.
    """
    factor = torch.linalg.cholesky(hessian.double())
    change = torch.cholesky_solve(missing.double().T, factor).T
    return (weight.double() + change).to(weight.dtype)


def quadratic_loss(weight: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """(w − t) H (w − t)ᵀ of each row (d_out,), in double precision."""
    error = (weight - target).double()
    return ((error @ hessian.double()) * error).sum(-1).clamp_min(0)


@torch.no_grad()
def solve(
    target: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    group_size: int | None = None,
    *,
    starts: tuple[float, ...] = STARTS,
    known: tuple[Tensor, Tensor] | None = None,
    max_sweeps: int = MAX_SWEEPS,
    granularity: str = "channel",
    steps: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (d_out, d_in) int8 and scales (d_out, n_groups) float32 of the weight in `scheme` next to `target`.

    target: (d_out, d_in). hessian: (d_in, d_in), of `damped`. known: codes and scales to start from as well. Of all
    starts each row keeps its best, so that no row ends worse than known. With granularity `tensor` the scale is (1, 1),
    and the rows keep the start that is best for all of them together. steps: scales to start from and zero points (both
    d_out, n_groups, or 1, 1), which stay, where the scheme is not symmetric.
    UsageError for a free scheme, and where the hessian is not that of such a weight or not finite.
    """
    if scheme.is_free:
        raise UsageError(f"solver: expected a scheme with codes, found {scheme.name}; its weights are free")
    d_in = target.shape[1]
    if hessian.shape != (d_in, d_in) or not torch.isfinite(hessian).all():
        raise UsageError(
            f"solver: expected a finite hessian ({d_in}, {d_in}) for a weight {tuple(target.shape)}, found "
            f"{tuple(hessian.shape)}; the inputs are those of another map, or hold NaN or infinity"
        )
    target, hessian = target.float(), hessian.float()
    whole = granularity == "tensor"
    nearest = start_scale(target, scheme, group_size, granularity) if steps is None else steps[0].to(target)
    nearest = nearest.expand(len(target), -1)
    zero = None if steps is None else steps[1].to(nearest).expand(nearest.shape)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    group_of = _groups(d_in, group_size, target.device)[order]
    goal, hessian = target[:, order], hessian[order][:, order].contiguous()
    levels = level_table(scheme, goal)

    many = goal.repeat(len(starts), 1)  # rows are independent, so that all starts go side by side
    scale = torch.cat([nearest * start for start in starts])
    zeros = None if zero is None else zero.repeat(len(starts), 1)
    codes = round_with_feedback(scale, zeros, many, hessian, levels, group_of)
    if known is not None:
        codes = torch.cat([codes, levels_of(known[0][:, order], scheme).to(codes)])
        scale = torch.cat([scale, known[1].to(scale).expand(len(goal), -1)])
        many = torch.cat([many, goal])
        zeros = None if zeros is None or zero is None else torch.cat([zeros, zero])
    if whole:
        _descend_whole_(codes, scale, zeros, many, hessian, levels, group_of, max_sweeps, len(goal))
    else:
        _descend_(codes, scale, zeros, many, hessian, levels, group_of, max_sweeps)
    # Rounding to nearest is the last candidate: of equals the solved one is kept.
    codes = torch.cat([codes, _rounded(goal, nearest, zero, levels, group_of)])
    scale = torch.cat([scale, nearest])
    many = torch.cat([many, goal])
    zeros = None if zeros is None or zero is None else torch.cat([zeros, zero])
    loss = quadratic_loss(weight_of(codes, scale, zeros, group_of), many, hessian)
    loss = loss.view(-1, len(goal))
    best = loss.sum(1).argmin().expand(len(goal)) if whole else loss.argmin(0)
    rows = best * len(goal) + torch.arange(len(goal), device=goal.device)
    return codes_of(codes[rows][:, order.argsort()], scheme), scale[rows[:1]] if whole else scale[rows]


def _descend_(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    target: Tensor,
    hessian: Tensor,
    levels: Tensor,
    group_of: Tensor,
    max_sweeps: int,
) -> None:
    """Scales and codes in turn until no code changes; rows that have come to rest are left out."""
    active = torch.arange(len(target), device=target.device)
    for _ in range(max_sweeps):
        some, steps, goal = codes[active], scale[active], target[active]
        zeros = None if zero_point is None else zero_point[active]
        rescale_(_shifted(some, zeros, group_of), steps, None, goal, hessian, group_of)
        changed = coordinate_descent_(some, steps, zeros, goal, hessian, levels, group_of)
        codes[active], scale[active] = some, steps
        active = active[changed > 0]
        if len(active) == 0:
            break
    rescale_(_shifted(codes, zero_point, group_of), scale, None, target, hessian, group_of)


def _shifted(codes: Tensor, zero_point: Tensor | None, group_of: Tensor) -> Tensor:
    """Codes less their zero points, which are not to move when the scales do."""
    return codes if zero_point is None else codes - zero_point[:, group_of]


def _descend_whole_(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    target: Tensor,
    hessian: Tensor,
    levels: Tensor,
    group_of: Tensor,
    max_sweeps: int,
    num_rows: int,
) -> None:
    """As `_descend_`, each `num_rows` rows sharing a scale; they come to rest together."""
    for sweep in range(max_sweeps + 1):
        shifted = _shifted(codes, zero_point, group_of)
        energy = (shifted @ hessian * shifted).sum(-1).view(-1, num_rows).sum(1)
        match = (shifted @ hessian * target).sum(-1).view(-1, num_rows).sum(1)
        best = match / energy.clamp_min(torch.finfo(energy.dtype).tiny)
        best = torch.where(energy > 0, best, scale[::num_rows, 0])
        scale.copy_(best.repeat_interleave(num_rows).unsqueeze(-1))
        if (
            sweep == max_sweeps
            or not coordinate_descent_(codes, scale, zero_point, target, hessian, levels, group_of).any()
        ):
            break


def _rounded(
    target: Tensor, scale: Tensor, zero_point: Tensor | None, levels: Tensor, group_of: Tensor
) -> Tensor:
    step = scale[:, group_of]
    ratio = target / torch.where(step == 0, torch.inf, step)
    return rounding(levels)(ratio if zero_point is None else ratio + zero_point[:, group_of])


def _groups(d_in: int, group_size: int | None, device: torch.device) -> Tensor:
    count = num_groups(d_in, group_size)
    return (
        torch.arange(d_in, device=device) // (group_size or d_in)
        if count > 1
        else torch.zeros(d_in, dtype=torch.int64, device=device)
    )
