"""Between codes and levels: the same numbers where levels are evenly spaced, a table look-up in a codebook."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from peelcli.quant.kernels.eager import rounding
from peelcli.quant.schemes import Scheme


@lru_cache(maxsize=64)  # a copy to a GPU waits for it
def _table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(levels, dtype=dtype, device=device)


def level_table(scheme: Scheme, like: Tensor) -> Tensor:
    """The levels (n_levels,) in the dtype and on the device of `like`; not to be written to."""
    return _table(scheme.levels, like.dtype, like.device)


def nearest_levels(ratio: Tensor, scheme: Scheme) -> Tensor:
    """The level next to each weight / scale; half-way between two the even one, or in a codebook the lower.

    `binary` takes the sign, 0 being positive.
    """
    if scheme.name == "binary":
        return torch.where(ratio >= 0, 1.0, -1.0).to(ratio.dtype)
    return rounding(level_table(scheme, ratio))(ratio)


def codes_of(levels: Tensor, scheme: Scheme) -> Tensor:
    """The codes (int8) of floating `levels`, each exactly one of the scheme's."""
    if scheme.is_codebook:
        levels = torch.searchsorted(level_table(scheme, levels), levels.contiguous()) + scheme.qmin
    return levels.to(torch.int8)


def levels_of(codes: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """The levels that `codes` (int8) stand for, in `dtype`."""
    if not scheme.is_codebook:
        return codes.to(dtype)
    return _table(scheme.levels, dtype, codes.device)[codes.long() - scheme.qmin]
