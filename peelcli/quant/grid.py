"""Do weights already lie on a low-bit grid? Then a layer's own bits are the grid's, not its dtype's.

A group lies on a grid when a step exists of which each of its values is a whole multiple. Random weights do
so by chance only where they are few, so every fit is weighed by the chance that it had of coming about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peelcli.quant.groups import check_weight, num_groups
from peelcli.quant.schemes import SCHEMES
from peelcli.records.quant_spec import QuantSpec

# How far a value may be from its multiple, in steps: a hundredth, and what bfloat16 rounds off:
_TOLERANCE = 0.01
_ROUNDING = 2.0**-7  # 2⁻⁸ of a value, and as much of its peak
# The peak of a group in steps. Ascending, since a grid of few levels lies on every multiple of its peak too; int7 ends
# at 64, and of what is left to int8 the usual peaks come first.
_PEAKS = (*range(1, 65), 127, 128, *range(126, 64, -1))
# Logs of the chance, for a group on average and for the whole tensor, below which a fit is no accident.
_CHANCE_PER_GROUP = -6.0
_CHANCE = -30.0
_SCALE_BITS = 16.0  # what the scale of a group costs: a finer grouping must save more than that
_SAMPLE_ROWS = 256
_CHUNK = 2**20  # values at a time


@dataclass(frozen=True)
class Grid:
    """The grid that weights lie on: the smallest scheme with as many levels, per channel or per group."""

    spec: QuantSpec
    num_bits: float
    """Bits per weight of the scheme, the scales not counted."""


@torch.no_grad()
def recognise_grid(weight: Tensor, sizes: Sequence[int | None] = (None, 256, 128, 64, 32, 16)) -> Grid | None:
    """The grid that `weight` (d_out, d_in) or (n_experts, d_out, d_in) lies on, or None.

    Values must be multiples of a step that each channel (None) or group has for itself, to within a hundredth
    of it and bfloat16 rounding. {±s} is `binary`, {−s, 0, s} `ternary`; at most 4, 8, … 128 equally
    spaced levels, with zero one of them (not necessarily the middle one) or half-way between two, are `int2`, `int3`,
    … `int7`; multiples up to ±128 are `int8`. One step for the whole tensor is a case of None. Of several
    grids it is the one with the fewest bits, scales counted. None too where it could be chance: constant or
    nearly empty tensors, very short rows; and where values are not finite.
    CheckpointError for a weight that is not linear, UsageError for a group size below 1.
    """
    check_weight(weight)
    rows = weight.detach().reshape(-1, weight.shape[-1])
    found = []
    # A single group is the whole channel, and reported as such.
    for size in dict.fromkeys(None if _is_whole(rows.shape[1], size) else size for size in sizes):
        levels = _levels_of_rows(_spread(rows, _SAMPLE_ROWS), size)
        if levels is not None:
            bits = SCHEMES[_scheme_of(levels)].num_bits
            found.append((bits + _SCALE_BITS / (size or rows.shape[1]), size))
    for _, size in sorted(found, key=lambda entry: entry[0]):
        levels = _levels_of_rows(rows, size)
        if levels is not None:
            name = _scheme_of(levels)
            return Grid(QuantSpec(name, size), SCHEMES[name].num_bits)
    return None


def _scheme_of(num_levels: int) -> str:
    return next(n for n, s in SCHEMES.items() if not s.is_codebook and num_levels <= len(s.levels))


def _spread(rows: Tensor, count: int) -> Tensor:
    """About `count` of the rows, evenly spread."""
    return rows[:: max(1, rows.shape[0] // count)]


def _is_whole(d_in: int, size: int | None) -> bool:
    """Whether a group of `size` holds a whole channel."""
    return num_groups(d_in, QuantSpec("fp", size)) == 1


def _groups(rows: Tensor, width: int | None) -> Iterator[Tensor]:
    """All groups of rows (n_rows, d_in) in parts (n, width), float32; short last groups come apart."""
    d_in = rows.shape[1]
    size = d_in if width is None else width
    whole = d_in // size * size
    for part in rows.split(max(1, _CHUNK // d_in)):
        yield part[:, :whole].reshape(-1, size).float()
        if whole < d_in:
            yield part[:, whole:].float()


def _levels_of_rows(rows: Tensor, width: int | None) -> int | None:
    """The most levels that any group of rows (n_rows, d_in) needs, or None where they lie on no grid."""
    first = next(_groups(_spread(rows, 8), width))
    if not _could_fit(_spread(first, 8)):
        return None
    num_levels, chance, informative = 2, 0.0, 0
    for groups in _groups(rows, width):
        fits = _fit(groups)
        if fits is None:
            return None
        num_levels = max(num_levels, int(fits[0].max()))
        chance += float(fits[1].sum())
        informative += int((fits[1] != 0).sum())
    no_accident = chance < _CHANCE and chance < _CHANCE_PER_GROUP * informative
    return num_levels if no_accident else None


def _could_fit(groups: Tensor) -> bool:
    """A cheap look at some values of a few groups (n, width): nearly all random weights end here."""
    peak = groups.abs().amax(-1)
    steps = peak.unsqueeze(-1) / torch.tensor(_PEAKS, device=groups.device)  # (n, n_peaks)
    some = _spread(groups.T, 64).T
    fits = _on_multiples(some.unsqueeze(1), steps.unsqueeze(-1))  # (n, n_peaks)
    return bool((fits.any(-1) | (peak == 0)).all())


def _fit(groups: Tensor) -> tuple[Tensor, Tensor] | None:
    """Levels needed (n,) and the log of their chance (n,) for groups (n, width); None where one fits nothing.

    The peak of a group is some whole number of steps: taken is the first of `_PEAKS` that makes all values
    multiples. A group that shows nothing (constant, or with a single value besides 0) has log chance 0.
    """
    peak = groups.abs().amax(-1)
    num_levels = torch.where(peak == 0, 2, 0)  # 0: still to be explained
    log_chance = torch.zeros_like(peak)
    some = _spread(groups.T, 16).T
    left = num_levels.eq(0).nonzero().squeeze(-1)
    for tries, multiple in enumerate(_PEAKS, start=1):
        if left.numel() == 0:
            break
        likely = left[_on_multiples(some[left], peak[left, None] / multiple)]
        fitting = likely[_on_multiples(groups[likely], peak[likely, None] / multiple)]
        if fitting.numel():
            codes = (groups[fitting] / (peak[fitting, None] / multiple)).round()
            num_levels[fitting] = _count_levels(codes)
            log_chance[fitting] = _log_chance(codes, num_levels[fitting], tries)
            left = left[num_levels[left] == 0]
    return (num_levels, log_chance) if left.numel() == 0 else None


def _on_multiples(values: Tensor, step: Tensor) -> Tensor:
    """Whether all values of the last axis are multiples of `step` (…, 1).

    0 must be 0 exactly, as it is in every format: else small values beside a large one would pass for it.
    """
    ratio = values / step
    codes = ratio.round()
    size = codes.abs()
    near = (ratio - codes).abs() <= _TOLERANCE + _ROUNDING * size
    return (near & ((size > 0) | (values == 0))).all(-1)


def _count_levels(codes: Tensor) -> Tensor:
    """Levels (n,) of the smallest grid that holds codes : 2 for {±s}, 3 for {−s, 0, s}, else 4 up."""
    size = codes.abs()
    odd = (size % 2 == 1).all(-1)  # then zero lies between levels, which are two codes apart
    span = codes.amax(-1) - codes.amin(-1)
    equally_spaced = (torch.where(odd, span / 2, span) + 1).clamp(4, 256)  # ±128 are 257
    return torch.where(size.amax(-1) > 1, equally_spaced, torch.where(odd, 2.0, 3.0)).long()


def _log_chance(codes: Tensor, num_levels: Tensor, tries: int) -> Tensor:
    """Log (n,) of the chance that as many random values as large fit one of the first `tries` peaks.

    With more than 16 levels each code counts once: the repeated values of a codebook not equally spaced
    (16 values, as in NF4) would else pass for as many coincidences.
    """
    top = int(codes.abs().max())
    counts = torch.zeros(codes.shape[0], 2 * top + 1, device=codes.device)  # of each code, from −top up
    counts.scatter_add_(1, (codes + top).long(), torch.ones_like(codes))
    counts = torch.where(num_levels[:, None] > 16, counts.clamp_max(1), counts)
    size = torch.arange(-top, top + 1, device=codes.device).abs()
    share = (2 * (_TOLERANCE + _ROUNDING * size)).clamp_max(1)  # of the room between two multiples
    share = torch.where(size > 0, share, 1.0).log()  # from ±62 on bfloat16 proves nothing
    total = counts @ share - torch.where(counts > 0, share, 0.0).amin(-1)  # one value made the step
    shows_nothing = (codes.amax(-1) == codes.amin(-1)) | (total == 0)
    return torch.where(shows_nothing, 0.0, total + math.log(tries))
