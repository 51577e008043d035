"""The size of a layer's weights proves nothing, and tells the hurt layer from its neighbours and from the idle one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import DROPPED, GAIN, challenge, changed, identity, measure, sizes, sound

from peelcli.verdict import judge
from peelcli.verdict.weight_norms import most_unlike, relative_size

NEARLY_IDLE = changed(
    sound(), {identity(4, "attention"): 0.06 * DROPPED["attention"]}, divergence=0.0, spread=0.1
)


@given(st.floats(0.05, 20.0), st.sampled_from([1, 3, 5]), st.sampled_from(["attention", "mlp"]))
def test_it_is_the_logarithm_of_how_much_larger_the_weights_are(factor, layer, part):
    run = measure({}, weight_rms=sizes({layer: factor}, part=part))
    assert relative_size(run, layer, part) == pytest.approx(np.log(factor))
    assert relative_size(run, layer, None) == pytest.approx(np.log(factor) / 2)
    assert most_unlike(run, layer) == pytest.approx(np.log(factor))
    assert [relative_size(run, n, part) for n in range(1, 6) if n != layer] == pytest.approx([0.0] * 4)


def test_where_nothing_is_known_it_is_none():
    for known in ((), sizes({}, 2), ({}, {}, {}, {}, {})):
        run = measure({}, weight_rms=known)
        assert [most_unlike(run, n) for n in range(1, 6) if n <= len(known) or not known] == [0.0] * len(
            known or (0,) * 5
        )


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.4])
def test_a_part_that_costs_little_is_matched_where_its_weights_are_unlike_the_others(factor):
    run = measure(NEARLY_IDLE, weight_rms=sizes({4: factor}, part="attention"), noise=0.0)
    verdict = judge(run).layers[3]
    assert (verdict.verdict, verdict.sublayer) == ("matched", "attention")
    assert verdict.score > 0.9


@pytest.mark.parametrize(
    "known", [(), sizes({}), sizes({4: 0.9}, part="attention"), sizes({4: 0.5}, part="mlp")]
)
def test_and_not_where_they_are_like_them(known):
    run = measure(NEARLY_IDLE, weight_rms=known, noise=0.0)
    verdict = judge(run).layers[3]
    assert verdict.verdict != "matched"
    assert verdict.score < 0.9


SLOPE = {2: 1.6, 3: 1.9, 4: 1.6}  # a fault in layer 3, and what its neighbours gain by repairing part of it


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.5])
def test_a_layer_that_gains_more_is_blamed_for_less_where_its_weights_are_unlike_the_others(factor):
    effects = changed(sound(), {challenge(n): -gain * GAIN for n, gain in SLOPE.items()})
    result = judge(measure(effects, weight_rms=sizes({3: factor}), noise=0.01))
    assert result.flagged == (() if factor == 1.0 else (3,))
    if factor != 1.0:
        assert ("larger" if factor > 1 else "smaller") in result.layers[2].reason
    elsewhere = judge(measure(effects, weight_rms=sizes({2: factor}), noise=0.01))
    assert elsewhere.flagged == ()  # only the peak is blamed


def test_what_does_better_dropped_behind_a_hurt_layer_is_put_down_to_that():
    effects = changed(sound(), {challenge(n): -gain * GAIN for n, gain in SLOPE.items()})
    effects = changed(effects, {identity(4, "attention"): -0.03}, divergence=0.2, spread=0.5)
    hurt = judge(measure(effects, weight_rms=sizes({3: 0.5}), noise=0.01))
    assert hurt.flagged == (3,)
    assert (hurt.layers[3].verdict, "layer 3" in hurt.layers[3].reason) == ("undecided", True)
    assert judge(measure(effects, weight_rms=sizes({}), noise=0.01)).flagged == (4,)


def test_free_weights_are_not_compared_with_those_on_a_grid():
    """One layer of a ternary model that is off the grid can be trained freely, and gains more for that alone."""
    effects = changed(sound(), {challenge(n): -0.001 for n in range(1, 6)})
    effects = changed(effects, {challenge(3): -0.05})
    bits = (1.58, 1.58, 32.0, 1.58, 1.58)
    assert judge(measure(effects, layer_bits=bits, noise=0.002)).layers[2].verdict != "surpassed"
    assert judge(measure(effects, layer_bits=(1.58,) * 5, noise=0.002)).layers[2].verdict == "surpassed"


def test_a_layer_off_the_others_grid_is_noted_and_not_flagged():
    off = judge(measure(sound(), layer_bits=(1.58, 1.58, 32.0, 1.58, 1.58)))
    assert off.flagged == ()
    assert any("layer 3" in note and "grid" in note for note in off.network.notes)
    for bits in ((32.0,) * 5, (1.58,) * 5, (16.0, 32.0, 16.0, 16.0, 16.0)):
        assert not any("grid" in note for note in judge(measure(sound(), layer_bits=bits)).network.notes)


def test_a_layer_that_is_hurt_itself_is_not_put_down_to_itself():
    effects = changed(sound(), {challenge(3): -4 * GAIN})
    effects = changed(effects, {identity(3): -5 * GAIN}, divergence=0.5)
    result = judge(measure(effects, weight_rms=sizes({3: 2.0})))
    assert result.flagged == (3,)
    assert result.layers[2].verdict == "surpassed"


@pytest.mark.parametrize(("cost", "is_flagged"), [(0.0008, False), (-0.002, True)])
def test_where_no_layers_attention_does_much_one_that_does_little_is_not_news(cost, is_flagged):
    young = {identity(n, "attention"): 0.002 * (1 + 0.1 * n) for n in range(1, 6)}
    effects = changed(sound(), young | {identity(3, "attention"): cost}, divergence=0.0, spread=0.01)
    verdict = judge(measure(effects, noise=0.0)).layers[2]
    assert (verdict.verdict == "matched") == is_flagged
