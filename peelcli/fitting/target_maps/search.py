"""The search for promising maps where there are too many to peel them all: dynamic programming over segments.

A map is a chain of segments (s, t]: layers s+1…t all aim at O_t. Each segment is measured once, from trained inputs, by
what it costs the loss in place of those layers; the costs of a map's segments add up to a guess of its bound.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from itertools import zip_longest

from peelcli.fitting.target_maps.maps import TargetMap

Segment = tuple[int, int]  # (s, t] with 0 ≤ s < t ≤ K


def segments(num_layers: int) -> list[Segment]:
    """All K(K+1)/2 segments, those from the same input together."""
    return [(s, t) for s in range(num_layers) for t in range(s + 1, num_layers + 1)]


def cheapest_maps(costs: Mapping[Segment, float], num_layers: int, count: int) -> list[TargetMap]:
    """The `count` maps of the least summed costs, the cheapest first; a segment without a cost is in none of them."""
    # best[t]: of the chains that end at t, the cheapest: (cost, segment ends).
    best: list[list[tuple[float, TargetMap]]] = [[(0.0, ())]]
    for end in range(1, num_layers + 1):
        longer = (
            (cost + costs[(start, end)], (*ends, end))
            for start in range(end)
            if (start, end) in costs
            for cost, ends in best[start]
        )
        best.append(heapq.nsmallest(count, longer))
    return [_map_of_ends(ends) for _, ends in best[num_layers]]


def promising_maps(costs: Mapping[Segment, float], num_layers: int, count: int) -> list[TargetMap]:
    """Up to `count` maps to peel, by turns from two guesses, the best of each first.

    The costs are of one block in place of a whole segment, and a path has as many blocks as the segment has layers: the
    first guess takes the costs as they are, the second divides them by the segment's length.
    """
    shared = {(s, t): cost / (t - s) for (s, t), cost in costs.items()}
    turns = zip_longest(
        cheapest_maps(costs, num_layers, count), cheapest_maps(shared, num_layers, count), fillvalue=None
    )
    found = dict.fromkeys(m for turn in turns for m in turn if m is not None)
    return list(found)[:count]


def _map_of_ends(ends: TargetMap) -> TargetMap:
    starts = (0, *ends)
    return tuple(end for start, end in zip(starts, ends, strict=False) for _ in range(end - start))
