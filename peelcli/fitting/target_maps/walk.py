"""The walk over target maps that fits each of their prefixes once. How a layer is fitted is a parameter (`Fit`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from peelcli.fitting.target_maps.maps import TargetMap, check_map

State = TypeVar("State")
Prepared = TypeVar("Prepared")
Weights = TypeVar("Weights", covariant=True)


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
class BlockState:
    """One more node of the prefix tree is fitted: the targets of layers 1…len(prefix)."""

    prefix: TargetMap


@dataclass(frozen=True)
class FittedPath(Generic[Weights]):
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
) -> Iterator[BlockState | FittedPath[Weights]]:
    """Fit every map from `inputs` (Z_0 = O_0), each prefix once; yield each fit, and each map at its end.

    The walk is depth-first, so that only one path's states and preparations are held. Among maps that branch at a
    node, the branch that `maps` names first comes first: with a budget, put those that matter most in front, and stop.
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
            yield BlockState(target_map[:layer])
        if len(prepared) < len(target_map):
            prepared.append(fit.prepare(states[-1]))
        bound, solution = fit.finish(prepared[-1])
        weights.append(solution)
        yield BlockState(target_map)
        yield FittedPath(target_map, bound, tuple(weights), len(target_map) - shared)
        before = target_map


def peel_all(
    fit: Fit[State, Prepared, Weights], inputs: State, maps: Iterable[Sequence[int]]
) -> list[FittedPath[Weights]]:
    """`peel` for those who don't watch: the maps alone."""
    return [event for event in peel(fit, inputs, maps) if isinstance(event, FittedPath)]


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
