"""The best low-bit weight for a linear map with quadratic loss, solved directly rather than by gradient descent.

Given inputs x with second moment H = Σ x xᵀ and a weight t that maps them to what is wanted, find codes and scales so
that Σ ‖(W − T) x‖² = tr (W − T) H (W − T)ᵀ is small: rounding with error feedback (GPTQ, arXiv 2210.17323) in the order
of the hessian's diagonal, from one or several step sizes; then sweeps of coordinate descent over codes and scales in
turn, until no single code can be changed for the better. Every step but the first can only lower the loss, row by row,
and a row that rounding to nearest serves better is rounded to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peelcli.errors import UsageError
from peelcli.quant.groups import num_groups
from peelcli.quant.initial_scale import start_scale
from peelcli.quant.kernels.descent import round_with_feedback
from peelcli.quant.kernels.eager import gradient_of, rounding, spread, upper_factor, weight_of
from peelcli.quant.levels import codes_of, level_table, levels_of
from peelcli.quant.rows import Rows
from peelcli.quant.schemes import Scheme, scheme_named
from peelcli.records.quant_spec import QuantSpec

DAMPING = 0.01  # of the mean of the diagonal: what GPTQ adds to it
MAX_SWEEPS = 20
_DOUBT = 1.02  # losses that close may stand the other way round in double precision
STARTS = (1.0, 0.8, 1.25)  # step sizes to begin with, relative to those of least squared error of the weights
# What errors add to what a column is to give makes it spread wider than the weights, which tells where levels are few.
_WIDER, _FEW_LEVELS = 1.05, 4
_STRIP = 128  # columns at a time


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The hessian (d_in, d_in) with `damping` of its mean diagonal added, in units of that mean.

    All zero (no input ever reached the map) it becomes the identity.
    """
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    found = hessian / mean
    found.diagonal().add_(damping)
    return found


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
    spec: QuantSpec,
    *,
    starts: tuple[float, ...] = STARTS,
    known: tuple[Tensor, Tensor] | None = None,
    max_sweeps: int = MAX_SWEEPS,
    qparams: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (d_out, d_in) int8 and scales (d_out, n_groups) float32 of the weight in the scheme closest to `target`.

    target: (d_out, d_in). hessian: (d_in, d_in), of `damped`. known: codes and scales to start from as well. Of all
    starts each row keeps its best, so that no row ends worse than known. With granularity `tensor` the scale is (1, 1),
    and the rows keep the start that is best for all of them together. qparams: where the spec is not
    symmetric, scales to start from and zero points (both d_out, n_groups, or 1, 1); the zero points stay.
    UsageError for a free scheme, and where the hessian is not that of such a weight or not finite.
    """
    scheme = scheme_named(spec.scheme)
    _require_solvable(target, hessian, scheme)
    target, hessian = target.float(), hessian.float()
    whole = spec.is_per_tensor
    nearest = start_scale(target, replace(spec, scale="mse")) if qparams is None else qparams[0].to(target)
    nearest = nearest.expand(len(target), -1)
    zero = None if qparams is None else qparams[1].to(nearest).expand(nearest.shape)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    group_of = _groups(target.shape[1], spec, target.device)[order]
    # `index_select`: indexing with a tensor takes three times as long.
    goal = target.index_select(1, order)
    hessian = hessian.index_select(0, order).index_select(1, order)
    levels = level_table(scheme, goal)
    # Rows are independent: all starts go side by side.
    wider = _WIDER if zero is None and len(scheme.levels) <= _FEW_LEVELS else 1.0
    factor = upper_factor(hessian)
    scale = torch.cat([nearest * (start * wider) for start in starts])
    zeros = None if zero is None else zero.repeat(len(starts), 1)
    many = goal.repeat(len(starts), 1)
    codes = round_with_feedback(scale, zeros, many, factor, levels, group_of)
    if known is not None:
        codes = torch.cat([codes, levels_of(known[0].index_select(1, order), scheme).to(codes)])
        scale = torch.cat([scale, known[1].to(scale).expand(len(goal), -1)])
        many = torch.cat([many, goal])
        zeros = None if zeros is None or zero is None else torch.cat([zeros, zero])
    pull = None if scale.shape[1] > 1 else (goal @ hessian).repeat(len(many) // len(goal), 1)
    rows = Rows(codes, scale, zeros, gradient_of(codes, scale, zeros, many, hessian, group_of), pull)
    rows.descend_(hessian, levels, group_of, max_sweeps, together=len(goal) if whole else 1)
    # Rounding to nearest is the last candidate: of equals the solved one is kept.
    found = [
        *zip(rows.codes.split(len(goal)), rows.scale.split(len(goal)), strict=True),
        (_rounded(goal, nearest, zero, levels, group_of), nearest),
    ]
    errors = [weight_of(*candidate, zero, group_of) - goal for candidate in found]
    pairs = zip(errors[:-1], rows.gradient.split(len(goal)), strict=True)
    loss = torch.stack([(error * gradient).sum(-1) for error, gradient in pairs]).double()
    limit = loss.amin(0) * _DOUBT
    rounded = _loss_up_to(errors[-1], factor, limit)
    best = _least(torch.cat([loss, rounded[None]]), errors, hessian, whole)
    codes, scale = _taken(found, best, scheme)
    return codes.index_select(1, order.argsort()), scale[:1] if whole else scale


def _require_solvable(target: Tensor, hessian: Tensor, scheme: Scheme) -> None:
    """UsageError for a free scheme, and where the hessian is not that of such a weight or not finite."""
    if scheme.is_free:
        raise UsageError(f"solver: expected a scheme with codes, found {scheme.name}; its weights are free")
    d_in = target.shape[1]
    # Both ends are NaN where any value is; that is cheaper than to look at every value.
    if hessian.shape != (d_in, d_in) or not all(map(math.isfinite, map(float, hessian.aminmax()))):
        raise UsageError(
            f"solver: expected a finite hessian ({d_in}, {d_in}) for a weight {tuple(target.shape)}, found "
            f"{tuple(hessian.shape)}; the inputs are those of another map, or hold NaN or infinity"
        )


def _loss_up_to(error: Tensor, factor: Tensor, limit: Tensor) -> Tensor:
    """What an error w − t (d_out, d_in) costs each row (d_out,); less than that where all rows are past their limit.

    The squared length of error · R, whose components need only the columns up to their own: the first are cheap, and
    mostly enough.
    """
    loss = torch.zeros_like(limit)
    for start in range(0, len(factor), _STRIP):
        stop = min(start + _STRIP, len(factor))
        loss += (error[:, :stop] @ factor[:stop, start:stop]).square().sum(-1)
        if bool((loss > limit).all()):
            break
    return loss


def _least(loss: Tensor, errors: Sequence[Tensor], hessian: Tensor, whole: bool) -> Tensor:
    """Which candidate costs each row least (d_out,), or all rows where the whole shares one.

    loss (n_candidates, d_out): as single precision has it; what that leaves in doubt is reckoned in double precision
    from the errors w − t, (d_out, d_in) each.
    """
    doubtful = ~((loss <= loss.amin(0) * _DOUBT).sum(0) == 1) | whole  # NaN is in doubt, too
    if bool(doubtful.any()):
        exact = hessian.double()
        for own, error in zip(loss, errors, strict=True):
            some = error[doubtful].double()
            own[doubtful] = (some @ exact * some).sum(-1)
    return loss.sum(1).argmin().expand(loss.shape[1]) if whole else loss.argmin(0)


def _taken(
    candidates: Sequence[tuple[Tensor, Tensor]], best: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """Codes and scales of the candidate (levels, scales) that is `best` (d_out,) for each row."""
    codes, scale = codes_of(candidates[0][0], scheme), candidates[0][1].clone()
    for n, (other_levels, other_scale) in enumerate(candidates[1:], 1):
        if bool((taken := best == n).any()):
            codes[taken], scale[taken] = codes_of(other_levels[taken], scheme), other_scale[taken]
    return codes, scale


def _rounded(
    target: Tensor, scale: Tensor, zero_point: Tensor | None, levels: Tensor, group_of: Tensor
) -> Tensor:
    step = spread(torch.where(scale == 0, torch.inf, scale), group_of)
    ratio = target / step
    return rounding(levels)(ratio if zero_point is None else ratio.add_(spread(zero_point, group_of)))


def _groups(d_in: int, spec: QuantSpec, device: torch.device) -> Tensor:
    count = num_groups(d_in, spec)
    return (
        torch.arange(d_in, device=device) // spec.group_width(d_in)
        if count > 1
        else torch.zeros(d_in, dtype=torch.int64, device=device)
    )
