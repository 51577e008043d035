"""A layer whose biases and norms lag behind the others' was hardly trained: less evidence convicts it, never none."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import DROPPED, GAIN, challenge, changed, identity, measure, sound, travels

from peelcli.verdict import Policy, judge
from peelcli.verdict.distance_from_init import lags, relative_travel, untouched, young_parts

NEARLY_IDLE = changed(
    sound(), {identity(4, "attention"): 0.06 * DROPPED["attention"]}, divergence=0.0, spread=0.1
)
# Layer 3 is stale: its neighbours repair as much of that as it does itself.
STALE = changed(sound(), {challenge(n): -gain * GAIN for n, gain in {2: 1.5, 3: 1.5, 4: 1.5}.items()})


@given(st.floats(0.01, 0.6), st.sampled_from([1, 3, 5]), st.sampled_from([None, "attention", "mlp"]))
def test_a_layer_that_has_moved_less_than_the_others_lags(factor, layer, part):
    run = measure({}, vector_travel=travels({layer: factor}, part=part))
    assert relative_travel(run, layer, part) == pytest.approx(np.log(factor), abs=0.15)
    young = young_parts(run, Policy())
    assert ((layer, part) in young) == (lags(run, None)[layer] > Policy().young_lag)
    assert {n for n, _ in young} <= {layer}


@pytest.mark.parametrize("known", [(), travels({}), travels({}, 2), ({}, {}, {}, {}, {})])
def test_where_nothing_is_known_or_nothing_is_unusual_none_does(known):
    run = measure({}, vector_travel=known)
    assert young_parts(run, Policy()) == set()
    assert not any(untouched(run, layer) for layer in range(1, (len(known) or 5) + 1))


def test_a_layer_that_is_further_than_the_others_is_not_young():
    run = measure({}, vector_travel=travels({3: 5.0}))
    assert young_parts(run, Policy()) == set()


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0])
def test_a_layer_that_gains_little_more_than_its_neighbours_is_blamed_where_it_is_young(factor):
    result = judge(measure(STALE, vector_travel=travels({3: factor}), noise=0.01))
    assert result.flagged == (() if factor == 1.0 else (3,))
    if factor == 0.4:
        assert re.search(r"biases and norms lie [34]\d% as far", result.layers[2].reason)


def test_youth_without_any_gain_beyond_the_others_convicts_nobody():
    result = judge(measure(sound(), vector_travel=travels({3: 0.0}), noise=0.01))
    assert result.flagged == ()
    assert any("exactly where training starts" in note for note in result.layers[2].notes)
    assert not any(v.notes for v in result.layers if v.layer != 3)


@pytest.mark.parametrize(("part", "is_matched"), [("attention", True), (None, True), ("mlp", False)])
def test_a_part_that_costs_little_is_matched_where_it_is_young(part, is_matched):
    run = measure(NEARLY_IDLE, vector_travel=travels({4: 0.1}, part=part), noise=0.0)
    verdict = judge(run).layers[3]
    assert (verdict.verdict == "matched") == is_matched
    assert verdict.sublayer == ("attention" if is_matched else None)


@pytest.mark.parametrize(
    ("part", "named"), [(None, ("block",)), ("attention", ("attention",)), ("mlp", ("mlp",))]
)
def test_what_training_never_reached_is_named(part, named):
    run = measure({}, vector_travel=travels({2: 0.0}, part=part))
    assert [untouched(run, n) for n in (1, 2, 3)] == [(), named, ()]


@pytest.mark.parametrize("share", [0.15, 0.3])
@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_what_training_never_reached_may_do_a_little_more(share, factor):
    effects = changed(
        sound(), {identity(4, "attention"): share * DROPPED["attention"]}, divergence=0.0, spread=0.1
    )
    run = measure(effects, vector_travel=travels({4: factor}, part="attention"), noise=0.0)
    assert (judge(run).flagged == (4,)) == (share < 0.2 and factor == 0.0)
