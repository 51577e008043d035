"""The step size that a fit starts from: by default the one with the least squared error, or near it."""

from __future__ import annotations

import torch
from torch import Tensor

from peelcli.errors import UsageError
from peelcli.quant.groups import check_finite, check_weight, scale_shape, split_groups
from peelcli.quant.kernels.eager import rounding
from peelcli.quant.levels import level_table
from peelcli.quant.schemes import Scheme, scheme_named
from peelcli.records.quant_spec import QuantSpec

SCALE_RULES = ("absmean", "absmax", "mse")
_CHUNK = 2**18  # elements at a time: the search makes many passes, which should stay in the cache…
_LARGE_CHUNK = 2**26  # …or keep an accelerator busy
_CLIP_RATIOS = torch.linspace(0.35, 1.0, 20).tolist()
_REFINEMENTS = 3
_FEW_LEVELS = 32  # with no more, every level is tried as the one that the largest weight lies on


@torch.no_grad()
def initial_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Scales (…, d_out, n_groups) for `weight` (…, d_out, d_in), float32 (float64 for float64 weights).

    `binary`: mean |w|, the optimum. `ternary`: the optimum, by sorting. All others: the best of many
    steps, refined by least squares. Never a larger squared error than rounding to nearest with step max|w| / the
    highest level, max|w| / |the lowest| or mean |w|. `fp`: ones. A group of zeros gets scale 0.
    CheckpointError for weights that are not linear or not finite, UsageError for a group size below 1.
    """
    check_weight(weight)
    check_finite(weight)
    scheme = scheme_named(spec.scheme)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    shape = scale_shape(weight.shape, spec)
    if scheme.is_free:
        return torch.ones(shape, dtype=dtype, device=weight.device)
    groups, widths = split_groups(weight.detach(), spec)
    rows = max(1, (_LARGE_CHUNK if weight.is_cuda else _CHUNK) // groups.shape[1])
    steps = [
        _step(part.to(dtype), width, scheme)
        for part, width in zip(groups.split(rows), widths.split(rows), strict=True)
    ]
    return torch.cat(steps).reshape(shape)


def start_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Scales (…, d_out, n_groups) for `weight` by the spec's scale rule, or (…, 1, 1) for granularity `tensor`.

    absmean: mean |w|. absmax: max |w| / the highest level. mse: `initial_scale`, whose dtypes and errors these have.
    UsageError for an unknown rule, and for absmean with `nf4`, whose levels end at 1: it would clip half the weights.
    """
    scheme, rule = scheme_named(spec.scheme), spec.scale
    if spec.is_per_tensor:
        weight = weight.reshape(*weight.shape[:-2], 1, -1)
    if rule == "mse" or scheme.is_free:
        return initial_scale(weight, spec)
    check_weight(weight)
    check_finite(weight)
    size = weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
    groups, widths = split_groups(size, spec)
    if rule == "absmean" and scheme.name != "nf4":
        steps = groups.sum(-1) / widths
    elif rule == "absmax":
        steps = groups.amax(-1) / scheme.levels[-1]
    else:
        rules = SCALE_RULES[1:] if scheme.name == "nf4" else SCALE_RULES
        raise UsageError(
            f"scale rule for {scheme.name}: expected one of {', '.join(rules)}, found {rule!r}; choose one of these"
        )
    return steps.reshape(scale_shape(weight.shape, spec))


def _step(groups: Tensor, widths: Tensor, scheme: Scheme) -> Tensor:
    """groups (n, width), filled up with zeros beyond `widths` (n,) → steps (n,)."""
    if scheme.name == "binary":
        return groups.abs().sum(-1) / widths
    if scheme.name == "ternary":
        return _ternary_step(groups)
    return _searched_step(groups, widths, scheme)


def _ternary_step(groups: Tensor) -> Tensor:
    """The exact optimum. With k weights nonzero the best are the k largest, at their mean magnitude, and the
    squared error falls by (their sum)² / k; so the best k is had from one sort and one running sum."""
    magnitudes = groups.abs().sort(dim=-1, descending=True).values
    totals = magnitudes.cumsum(-1)  # (n, width)
    counts = torch.arange(1, groups.shape[-1] + 1, device=groups.device)
    best = (totals / counts.sqrt()).argmax(-1, keepdim=True)
    return (totals.gather(-1, best) / (best + 1)).squeeze(-1)


def _searched_step(groups: Tensor, widths: Tensor, scheme: Scheme) -> Tensor:
    """Search over clip ratios, then rounds of assign and least squares, each kept only where it helps."""
    # Magnitudes near 1 keep squares from overflow and underflow; by a power of two, which rounds nothing.
    exponent = torch.frexp(groups.abs().amax(-1)).exponent.clamp(-120, 120)
    groups = torch.ldexp(groups, -exponent.unsqueeze(-1))
    peak = groups.abs().amax(-1)
    bound = -scheme.levels[0]
    divisors = [float(scheme.levels[-1]), *(bound / ratio for ratio in _CLIP_RATIOS)]
    if len(scheme.levels) <= _FEW_LEVELS:  # a grid they lie on is kept
        divisors += sorted({abs(float(level)) for level in scheme.levels if level})
    best_step = groups.abs().sum(-1) / widths
    table = level_table(scheme, groups)
    best_error, _ = _round_to_nearest(groups, best_step, table)
    for divisor in divisors:
        best_step, best_error = _keep_better(groups, best_step, best_error, peak / divisor, table)
    for _ in range(_REFINEMENTS):
        _, levels = _round_to_nearest(groups, best_step, table)
        energy = levels.square().sum(-1)
        fitted = (groups * levels).sum(-1) / torch.where(energy == 0, 1.0, energy)
        best_step, best_error = _keep_better(groups, best_step, best_error, fitted, table)
    return torch.ldexp(best_step, exponent)


def _keep_better(
    groups: Tensor, best_step: Tensor, best_error: Tensor, step: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    error, _ = _round_to_nearest(groups, step, table)
    better = error < best_error
    return torch.where(better, step, best_step), torch.where(better, error, best_error)


def _round_to_nearest(groups: Tensor, step: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error (n,) and levels (n, width) of groups (n, width) with steps (n,)."""
    column = step.unsqueeze(-1)
    levels = rounding(table)(groups / torch.where(column == 0, torch.inf, column))
    return (levels * column - groups).square_().sum(-1), levels
