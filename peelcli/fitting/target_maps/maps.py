"""Target maps: which trained state every layer of a path is to reproduce.

A target map of K layers says of layer l = 1…K the trained state O_t that it is fitted to, t = π(l) ≥ l. Maps and
subsets S of {1…K−1} are the same thing: π_S(l) = min{s in S: s ≥ l}, or K where there is none. Source: the YES bounds
of arXiv 2410.10984 and of "Trust, but Verify", arXiv 2605.02853.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

from peelcli.errors import UsageError

TargetMap = tuple[int, ...]  # π(1) … π(K), layers counted from 1
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
