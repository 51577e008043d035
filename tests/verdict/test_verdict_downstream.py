"""What is found in a layer because of another's fault is put down to that, and what is found apart from it is not."""

from __future__ import annotations

import pytest
from simulated import DROPPED, GAIN, challenge, changed, identity, idle, measure, sound

from peelcli.verdict import judge

WORTH = DROPPED[None]


@pytest.mark.parametrize(("gain", "flagged"), [(0.05, (2,)), (0.25, (2, 4))])
def test_what_does_a_little_better_dropped_behind_a_layer_that_is_hurt_far_more_is_put_down_to_that(
    gain, flagged
):
    effects = changed(
        sound(), {identity(2): -0.3, identity(4, "attention"): -gain}, divergence=0.5, spread=0.2
    )
    result = judge(measure(effects, noise=0.01))
    assert result.flagged == flagged
    if 4 not in flagged:
        assert result.layers[3].verdict == "undecided"
        assert "Mend layer 2 first" in result.layers[3].advice


def test_a_layer_before_the_hurt_one_is_not_behind_it():
    effects = changed(
        sound(), {identity(4): -0.3, identity(2, "attention"): -0.05}, divergence=0.5, spread=0.2
    )
    assert judge(measure(effects, noise=0.01)).flagged == (2, 4)


@pytest.mark.parametrize(("hurt", "idle_layer", "flagged"), [(2, 4, (2,)), (4, 2, (2, 4)), (0, 4, (4,))])
@pytest.mark.parametrize("part", [None, "attention"])
def test_no_match_counts_behind_a_layer_that_does_more_harm_than_a_layer_is_worth(
    hurt, idle_layer, flagged, part
):
    costs = idle(idle_layer, part=part) | ({identity(hurt): -3 * WORTH} if hurt else {})
    result = judge(measure(changed(sound(), costs, divergence=0.001, spread=0.05), noise=0.01))
    assert result.flagged == flagged
    if idle_layer not in flagged:
        assert "Mend layer 2 first" in result.layers[idle_layer - 1].advice


def test_behind_a_layer_that_does_little_harm_a_match_counts():
    costs = idle(4) | {identity(2): -0.5 * WORTH}
    result = judge(measure(changed(sound(), costs, divergence=0.001, spread=0.05), noise=0.01))
    assert [result.layers[n - 1].verdict for n in (2, 4)] == ["surpassed", "matched"]


@pytest.mark.parametrize(("trained", "flagged"), [(GAIN, (4,)), (0.5, (2, 4))])
def test_what_does_better_dropped_before_a_layer_that_mends_far_more_trained_is_put_down_to_that(
    trained, flagged
):
    costs = {identity(4): -0.07, identity(2, "attention"): -0.05, challenge(4): -0.5, challenge(2): -trained}
    result = judge(measure(changed(sound(), costs, divergence=0.5, spread=0.2), noise=0.01))
    assert result.flagged == flagged
    assert result.layers[3].verdict == "surpassed"
