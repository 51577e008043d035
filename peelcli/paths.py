"""Peeled paths: which trained state every layer is to reproduce, and the walk that fits each prefix of a map once.

A target map of K layers says of layer l = 1…K the trained state O_t that it is fitted to, t = π(l) ≥ l. Maps and
subsets S of {1…K−1} are the same thing: π_S(l) = min{s in S: s ≥ l}, or K where there is none. Source: the YES bounds
of arXiv 2410.10984 and of "Trust, but Verify", arXiv 2605.02853. How a layer is fitted is a parameter here (`Fit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, Protocol, TypeVar

from peelcli.errors import UsageError

TargetMap = tuple[int, ...]  # π(1) … π(K), layers counted from 1
State = TypeVar("State")
Prepared = TypeVar("Prepared")
Weights = TypeVar("Weights", covariant=True)

MOST_LAYERS_FOR_ALL = 8  # 128 maps; each further layer doubles them
NAMED: dict[str, Callable[[int], Iterable[int]]] = {
    "direct": lambda num_layers: range(1, num_layers),  # every layer its own state: [1, 2, …, K]
    "last": lambda num_layers: (),  # every layer the last state: [K, K, …, K], the map of YES-0
    "first-last": lambda num_layers: range(1, min(2, num_layers)),  # [1, K, …, K]
}


def map_of_subset(subset: Iterable[int], num_layers: int) -> TargetMap:
    """π_S of the layers S that are targets besides the last; each in 1…K−1, in any order."""
    targets = set(subset)
    if num_layers < 1 or not all(1 <= target < num_layers for target in targets):
        raise UsageError(
            f"targets {sorted(targets)}: expected layers from 1 to {num_layers - 1} of a model of {num_layers}; "
            "leave out those that are none (the last layer is always a target)"
        )
    reached = [num_layers]
    for layer in range(num_layers - 1, 0, -1):
        reached.append(layer if layer in targets else reached[-1])
    return tuple(reversed(reached))


def subset_of_map(target_map: TargetMap) -> frozenset[int]:
    """The S of a target map: its targets but for the last layer."""
    return frozenset(target_map) - {len(target_map)}


def named_map(name: str, num_layers: int) -> TargetMap:
    """The map of that name (a key of `NAMED`) for a model of `num_layers`."""
    if name not in NAMED:
        raise UsageError(
            f"map {name!r}: expected one of {', '.join(NAMED)}, or a map written out such as [3, 3, 3, 4]"
        )
    return map_of_subset(NAMED[name](num_layers), num_layers)


def all_maps(num_layers: int) -> Iterator[TargetMap]:
    """All 2^(K−1) maps, those of fewer targets first; K up to 8."""
    if not 1 <= num_layers <= MOST_LAYERS_FOR_ALL:
        raise UsageError(
            f"all maps of {num_layers} layers: expected 1 to {MOST_LAYERS_FOR_ALL} layers, since each further one "
            f"doubles the number of maps; choose maps instead ({', '.join(NAMED)}, or some written out)"
        )
    for size in range(num_layers):
        for subset in combinations(range(1, num_layers), size):
            yield map_of_subset(subset, num_layers)


def check_map(written: Sequence[int], num_layers: int) -> TargetMap:
    """A map that was written out, as a `TargetMap`; where it is none, the error says which layer breaks it and how."""
    fault = _fault(written, num_layers)
    if fault is None:
        return tuple(written)
    raise UsageError(f"map {list(written)} of a model of {num_layers} layers: {fault}")


def _fault(written: Sequence[int], num_layers: int) -> str | None:
    if len(written) != num_layers or num_layers < 1:
        return f"expected one target for each layer, found {len(written)}; write {num_layers} numbers"
    for layer, target in enumerate(written, start=1):
        if isinstance(target, bool) or not isinstance(target, int) or not 1 <= target <= num_layers:
            return f"expected layers from 1 to {num_layers}, found {target!r} for layer {layer}; write one of those"
    nearest = list(map_of_subset(set(written) - {num_layers}, num_layers))
    for layer, target in enumerate(written, start=1):
        if target < layer:
            return (
                f"layer {layer} aims at layer {target}, which lies below it; expected its own number or a higher "
                f"one; the map with these targets is {nearest}"
            )
        if target > layer and written[layer] != target:
            return (
                f"layer {layer} aims at layer {target}, so that all layers up to {target} have to, but layer "
                f"{layer + 1} aims at {written[layer]}; the map with these targets is {nearest}"
            )
    return None


class Fit(Protocol[State, Prepared, Weights]):
    """How one layer is fitted. `State` is what passes from layer to layer, for all samples at once."""

    def prepare(self, inputs: State) -> Prepared:
        """What every fit from these inputs can share: a factorisation, batches. Called once for each input."""
        ...

    def solve(self, prepared: Prepared, layer: int, target: int) -> tuple[State, Weights]:
        """Fit `layer` (1…K−1) to the trained state of layer `target`; its outputs, and the weights that give them."""
        ...

    def finish(self, prepared: Prepared) -> tuple[float, Weights]:
        """Fit layer K to the last target; the loss of the network that has come about, and the weights."""
        ...


@dataclass(frozen=True)
class Peeled(Generic[Weights]):
    """One map, fitted from the bottom: the loss of its network, and the weights of layers 1…K that reach it."""

    target_map: TargetMap
    bound: float
    weights: tuple[Weights, ...]
    new_fits: int  # those that the maps before it had not already made


def count_fits(maps: Iterable[TargetMap]) -> int:
    """How many fits these maps need together: their distinct prefixes, the nodes of their prefix tree."""
    return len({target_map[:depth] for target_map in maps for depth in range(1, len(target_map) + 1)})


def peel(
    fit: Fit[State, Prepared, Weights], inputs: State, maps: Iterable[Sequence[int]]
) -> Iterator[Peeled[Weights]]:
    """Fit every map from `inputs` (Z_0 = O_0), each prefix once, and yield the maps as they come to their end.

    The walk is depth-first, so that only one path's states and preparations are held. Among maps that branch at a
    node, the branch that `maps` names first comes first: with a budget, put those that matter most in front.
    """
    states: list[State] = [inputs]
    prepared: list[Prepared] = []
    weights: list[Weights] = []
    before: TargetMap = ()
    for target_map in _depth_first(maps):
        shared = _common_prefix(before, target_map)
        # What hangs below the branching goes before anything new is made: a second path would double the memory.
        del states[shared + 1 :], prepared[shared + 1 :], weights[shared:]
        for layer, target in enumerate(target_map[shared:-1], start=shared + 1):
            if len(prepared) < layer:
                prepared.append(fit.prepare(states[-1]))
            outputs, solution = fit.solve(prepared[-1], layer, target)
            states.append(outputs)
            weights.append(solution)
            del outputs
        if len(prepared) < len(target_map):
            prepared.append(fit.prepare(states[-1]))
        bound, solution = fit.finish(prepared[-1])
        weights.append(solution)
        yield Peeled(target_map, bound, tuple(weights), len(target_map) - shared)
        before = target_map


def _depth_first(maps: Iterable[Sequence[int]]) -> list[TargetMap]:
    """The distinct maps in an order that never comes back to a prefix it has left; all of the same K layers."""
    written = list(maps)
    distinct = list(dict.fromkeys(check_map(m, len(written[0])) for m in written))
    first: dict[TargetMap, int] = {}
    for place, target_map in enumerate(distinct):
        for depth in range(1, len(target_map) + 1):
            first.setdefault(target_map[:depth], place)
    return sorted(distinct, key=lambda m: [first[m[:depth]] for depth in range(1, len(m) + 1)])


def _common_prefix(one: TargetMap, other: TargetMap) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


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


def running_minimum(bounds: Iterable[float]) -> tuple[float, ...]:
    """The least bound up to each checkpoint of a run, a stair-step that stays achievable.

    A checkpoint without a bound (nan) adds nothing: the step stays where it was, at infinity while there is none.
    """
    steps = [math.inf]
    for bound in bounds:
        steps.append(min(steps[-1], _or_infinite(bound)))
    return tuple(steps[1:])


def _or_infinite(bound: float) -> float:
    return math.inf if math.isnan(bound) else bound
