"""Maps and subsets are the same thing, and the walk over maps fits each prefix once and holds one path only."""

from __future__ import annotations

import itertools
import math
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peelcli.errors import UsageError
from peelcli.fitting.target_maps import (
    NAMED,
    BlockState,
    FittedPath,
    TargetMap,
    all_maps,
    best_map,
    cheapest_maps,
    check_map,
    count_fits,
    map_of_subset,
    named_map,
    peel,
    peel_all,
    promising_maps,
    segments,
    subset_of_map,
    yes_bound,
)
from peelcli.verdict.statistics import running_minimum

MAPS = st.integers(1, 7).flatmap(
    lambda k: st.lists(st.sampled_from(list(all_maps(k))), min_size=1, max_size=40)
)
LOSSES = st.lists(st.floats(0, 100) | st.just(math.nan), max_size=20)


class Trail:
    """A state that says how it came about; its references are weak, so that the living can be counted."""

    def __init__(self, targets: TargetMap) -> None:
        self.targets = targets


class TrailFit:
    """A fit whose outputs are the targets so far, and which records what it was asked."""

    def __init__(self) -> None:
        self.prepared: list[TargetMap] = []
        self.solved: list[TargetMap] = []
        self.living: weakref.WeakSet[Trail] = weakref.WeakSet()
        self.most_living = 0

    def prepare(self, inputs: Trail) -> TargetMap:
        self.prepared.append(inputs.targets)
        return inputs.targets

    def solve(self, prepared: TargetMap, layer: int, target: int) -> tuple[Trail, str]:
        assert layer == len(prepared) + 1
        outputs = Trail((*prepared, target))
        self.solved.append(outputs.targets)
        self.living.add(outputs)
        self.most_living = max(self.most_living, len(self.living))
        return outputs, f"{layer}->{target}"

    def finish(self, prepared: TargetMap) -> tuple[float, str]:
        num_layers = len(prepared) + 1
        self.solved.append((*prepared, num_layers))
        # A loss of its own for each path: its targets as the digits of a number.
        loss = float(sum(target * 10**place for place, target in enumerate(prepared)))
        return loss, f"{num_layers}->{num_layers}"


def walked(maps: list[TargetMap]) -> tuple[TrailFit, list[tuple[TargetMap, float, tuple[str, ...], int]]]:
    fit = TrailFit()
    return fit, [(p.target_map, p.bound, p.weights, p.new_fits) for p in peel_all(fit, Trail(()), maps)]


@given(st.integers(1, 12).flatmap(lambda k: st.tuples(st.just(k), st.sets(st.integers(1, max(1, k - 1))))))
def test_a_subset_and_its_map_are_the_same_thing(case):
    num_layers, subset = case
    subset -= {num_layers}
    target_map = map_of_subset(subset, num_layers)
    assert subset_of_map(target_map) == subset
    for layer, target in enumerate(target_map, start=1):
        assert target == min([s for s in subset if s >= layer], default=num_layers)


@pytest.mark.parametrize("num_layers", range(1, 6))
def test_a_written_map_is_taken_exactly_where_it_is_the_map_of_a_subset(num_layers):
    maps = set(all_maps(num_layers))
    assert len(maps) == 2 ** (num_layers - 1)
    for written in itertools.product(range(num_layers + 2), repeat=num_layers):
        if written in maps:
            assert check_map(list(written), num_layers) == written
        else:
            with pytest.raises(UsageError):
                check_map(written, num_layers)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ([3, 3, 4], r"one target for each layer, found 3; write 4 numbers"),
        ([1, 2, 3, 5], r"layers from 1 to 4, found 5 for layer 4"),
        ([1, 2, 3, "4"], r"found '4' for layer 4"),
        ([True, 2, 3, 4], r"found True for layer 1"),
        ([2, 1, 3, 4], r"layer 1 aims at layer 2, .* but layer 2 aims at 1; .* is \[1, 2, 3, 4\]"),
        ([1, 1, 3, 4], r"layer 2 aims at layer 1, which lies below it; .* is \[1, 3, 3, 4\]"),
        ([3, 3, 4, 4], r"layer 2 aims at layer 3, .* but layer 3 aims at 4; .* is \[3, 3, 3, 4\]"),
    ],
)
def test_the_error_says_why_it_is_no_map_and_which_would_be(written, why):
    with pytest.raises(UsageError, match=why):
        check_map(written, 4)


def test_named_maps():
    assert {name: named_map(name, 4) for name in NAMED} == {
        "direct": (1, 2, 3, 4),
        "last": (4, 4, 4, 4),
        "first-last": (1, 4, 4, 4),
    }
    assert {named_map(name, 1) for name in NAMED} == {(1,)}
    with pytest.raises(UsageError, match="expected one of direct, last, first-last"):
        named_map("middle", 4)


def test_subsets_and_sizes_out_of_range_are_refused():
    for subset, num_layers in (({0}, 4), ({4}, 4), ((), 0)):
        with pytest.raises(UsageError, match="expected layers from 1 to"):
            map_of_subset(subset, num_layers)
    for num_layers in (0, 9):
        with pytest.raises(UsageError, match="expected 1 to 8 layers"):
            list(all_maps(num_layers))


def test_all_maps_begin_with_those_of_fewest_targets():
    sizes = [len(subset_of_map(m)) for m in all_maps(6)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0


@given(MAPS)
def test_no_node_is_fitted_twice_and_no_input_prepared_twice(maps):
    fit, found = walked(maps)
    prefixes = {m[:depth] for m in maps for depth in range(len(maps[0]) + 1)}
    assert sorted(fit.solved) == sorted(prefixes - {()})
    assert sorted(fit.prepared) == sorted({prefix for prefix in prefixes if len(prefix) < len(maps[0])})
    assert count_fits(maps) == len(fit.solved) == sum(new for *_, new in found)


@given(MAPS)
def test_every_map_comes_once_and_as_it_would_on_its_own(maps):
    _, found = walked(maps)
    assert sorted(m for m, *_ in found) == sorted(set(maps))
    for target_map, bound, weights, _ in found:
        _, [(_, alone, alone_weights, new)] = walked([target_map])
        assert (bound, weights) == (alone, alone_weights)
        assert new == len(target_map) == len(weights)


@given(MAPS)
def test_one_path_is_held_at_a_time(maps):
    fit, _ = walked(maps)
    assert fit.most_living <= len(maps[0]) - 1


@given(MAPS)
def test_the_map_that_is_named_first_comes_first(maps):
    assert walked(maps)[1][0][0] == maps[0]


def test_a_branch_that_is_named_first_comes_before_its_neighbours():
    maps = [(4, 4, 4, 4), (1, 3, 3, 4), (3, 3, 3, 4), (1, 2, 3, 4)]
    assert [m for m, *_ in walked(maps)[1]] == [(4, 4, 4, 4), (1, 3, 3, 4), (1, 2, 3, 4), (3, 3, 3, 4)]


def test_all_maps_of_eight_layers_need_half_the_fits():
    assert count_fits(all_maps(8)) == 502
    assert len(walked(list(all_maps(8)))[0].prepared) == 375


def test_maps_that_are_none_or_of_other_models_are_refused_before_anything_is_fitted():
    assert walked([])[1] == []
    for maps in ([(1, 2), (1, 2, 3)], [(1, 2), (1, 1)]):
        fit = TrailFit()
        with pytest.raises(UsageError):
            list(peel_all(fit, Trail(()), maps))
        assert fit.solved == []


@given(LOSSES)
def test_the_running_minimum_is_a_stair_that_only_goes_down(losses):
    steps = running_minimum(losses)
    assert len(steps) == len(losses)
    assert all(later <= earlier for earlier, later in itertools.pairwise(steps))
    for at, step in enumerate(steps):
        known = [loss for loss in losses[: at + 1] if not math.isnan(loss)]
        assert step == min(known, default=math.inf)


@given(
    st.integers(1, 6).flatmap(
        lambda k: st.tuples(st.just(k), st.lists(st.floats(0, 9), min_size=32, max_size=32))
    )
)
def test_yes_k_never_rises_with_k_and_ends_at_the_yes_bound(case):
    num_layers, losses = case
    bounds = dict(zip(all_maps(num_layers), losses, strict=False))
    steps = [yes_bound(bounds, k) for k in range(num_layers)]
    assert steps[0] == bounds[named_map("last", num_layers)]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == yes_bound(bounds) == bounds[best_map(bounds)] == min(bounds.values())
    for k, step in enumerate(steps):
        assert step == min(loss for m, loss in bounds.items() if len(subset_of_map(m)) <= k)


def test_a_yes_bound_without_its_maps_is_refused():
    bounds = {named_map("direct", 4): 1.0, named_map("last", 4): 2.0}
    assert yes_bound(bounds) == 1.0
    assert yes_bound(bounds, 0) == 2.0
    with pytest.raises(UsageError, match="YES-1 of 4 layers: expected the bounds of 4 maps, found 1"):
        yes_bound(bounds, 1)
    with pytest.raises(UsageError, match="expected the bounds of 1 maps, found 0"):
        yes_bound({})


def test_a_fit_that_diverged_is_never_the_best_while_there_is_another():
    diverged, sound = named_map("last", 3), named_map("direct", 3)
    assert best_map({diverged: math.nan, sound: 5.0}) == sound
    assert math.isnan(yes_bound({diverged: math.nan}))


# -- the search -----------------------------------------------------------------------------------------------------


# Multiples of 1/64, whose sums are exact in any order, so that rounding never decides which map is the cheapest.
COSTS = st.integers(1, 6).flatmap(
    lambda k: st.fixed_dictionaries(
        {segment: st.integers(-64, 320).map(lambda n: n / 64) for segment in segments(k)}
    )
)


def ends_of(target_map: TargetMap) -> list[int]:
    return sorted(set(target_map))


def cost_of(target_map: TargetMap, costs: dict[tuple[int, int], float]) -> float:
    ends = ends_of(target_map)
    return sum(costs[pair] for pair in zip([0, *ends], ends, strict=False))


@given(COSTS, st.integers(1, 10))
def test_the_cheapest_maps_are_those_of_an_exhaustive_search(costs, count):
    num_layers = max(t for _, t in costs)
    found = cheapest_maps(costs, num_layers, count)
    assert len(set(found)) == len(found) == min(count, 2 ** (num_layers - 1))
    every = sorted(cost_of(m, costs) for m in all_maps(num_layers))
    assert [cost_of(m, costs) for m in found] == pytest.approx(every[: len(found)])


@given(COSTS, st.integers(1, 10))
def test_promising_maps_begin_with_the_cheapest_and_repeat_none(costs, count):
    num_layers = max(t for _, t in costs)
    found = promising_maps(costs, num_layers, count)
    assert found[0] == cheapest_maps(costs, num_layers, 1)[0]
    assert len(set(found)) == len(found) <= count
    assert all(check_map(m, num_layers) == m for m in found)


def test_a_segment_that_was_not_scored_is_in_no_map():
    costs = {segment: 1.0 for segment in segments(3) if segment != (0, 3)}
    assert (3, 3, 3) not in cheapest_maps(costs, 3, 9)
    assert cheapest_maps({}, 3, 9) == []


@given(MAPS)
def test_every_fit_is_announced_once(maps):
    events = list(peel(TrailFit(), Trail(()), maps))
    fitted = [e.prefix for e in events if isinstance(e, BlockState)]
    assert len(fitted) == len(set(fitted)) == count_fits(maps)
    assert {e.target_map for e in events if isinstance(e, FittedPath)} == set(maps)
