"""YES bounds: the least loss over the maps that were peeled."""

from __future__ import annotations

import math
from collections.abc import Mapping

from peelcli.errors import UsageError
from peelcli.fitting.target_maps.maps import TargetMap, subset_of_map


def best_map(bounds: Mapping[TargetMap, float], max_targets: int | None = None) -> TargetMap:
    """The map of the least bound, over the maps of at most `max_targets` targets besides the last (None: over all).

    bounds: of each map that was fitted. With `max_targets` k it is YES-k, for which every map of |S| ≤ k must be there.
    A bound that is not a number (the fit diverged) is never the least while there is another.
    """
    within = [m for m in bounds if max_targets is None or len(subset_of_map(m)) <= max_targets]
    num_layers = len(next(iter(bounds), ()))
    needed = (
        1
        if max_targets is None
        else sum(math.comb(max(num_layers - 1, 0), k) for k in range(max_targets + 1))
    )
    if len(within) < needed:
        kind = "a YES bound" if max_targets is None else f"YES-{max_targets}"
        raise UsageError(
            f"{kind} of {num_layers} layers: expected the bounds of {needed} maps, found {len(within)}; "
            "fit the others too"
        )
    return min(within, key=lambda m: _or_infinite(bounds[m]))


def yes_bound(bounds: Mapping[TargetMap, float], max_targets: int | None = None) -> float:
    """The bound of `best_map`: YES-0 for 0, YES-k for k, the YES bound of all the maps that were fitted for None."""
    return bounds[best_map(bounds, max_targets)]


def _or_infinite(bound: float) -> float:
    return math.inf if math.isnan(bound) else bound
