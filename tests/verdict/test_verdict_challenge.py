"""`challenge` blames the one layer that gains far more than the others, and otherwise none."""

from __future__ import annotations

import pytest
from simulated import GAIN, challenge, changed, foreign, identity, idle, measure, rescored, sound

from peelcli.verdict import judge


@pytest.mark.parametrize("gain", [0.0, 0.03, 0.09, 0.5])
def test_layers_that_gain_alike_are_not_flagged_and_the_network_note_says_so(gain):
    effects = changed(sound(), {challenge(n): -gain * (1 + 0.05 * n) for n in range(1, 6)})
    result = judge(measure(effects))
    assert result.flagged == ()
    notes = [n for n in result.network.notes if "trained on" in n]
    assert bool(notes) == (gain > 0.02)
    assert all("whole network" in n and "No layer is flagged" in n for n in notes)


@pytest.mark.parametrize("layer", [1, 3, 5])
def test_a_layer_that_gains_far_more_is_flagged_and_its_risen_neighbours_are_not(layer):
    costs = {challenge(layer): -4 * GAIN}
    costs |= {challenge(n): -2.2 * GAIN for n in (layer - 1, layer + 1) if 1 <= n <= 5}
    for seed in range(5):
        result = judge(measure(changed(sound(), costs), seed=seed))
        verdict = result.layers[layer - 1]
        assert result.flagged == (layer,)
        assert (verdict.verdict, verdict.sublayer, verdict.reference) == (
            "surpassed",
            "block",
            challenge(layer),
        )
        assert verdict.gap == pytest.approx(
            result.gap_of(challenge(layer))
        )  # as `peel verify` will measure it
        assert verdict.gap_interval[0] > 0
        assert verdict.score == max(v.score for v in result.layers)


def test_a_gain_that_is_only_a_smaller_loss_than_the_others_make_proves_nothing():
    """All got worse (driven too hard), one less so: it stands out, and is still no better than as trained."""
    effects = changed(sound(), {challenge(n): 0.20 for n in range(1, 6)})
    for cost in (0.05, 0.0):
        assert judge(measure(changed(effects, {challenge(4): cost}))).flagged == ()
    assert judge(measure(changed(effects, {challenge(4): -0.05}))).flagged == (4,)


def test_foreign_text_never_flags_by_challenge():
    run = measure(changed(sound(), {challenge(3): -10 * GAIN}))
    assert judge(run).flagged == (3,)
    assert judge(foreign(run)).flagged == ()


def test_another_fault_comes_first():
    effects = changed(sound(), {challenge(3): -10 * GAIN})
    effects = changed(effects, {identity(4, "attention"): -0.08}, divergence=0.2)
    assert judge(measure(effects)).flagged == (4,)
    assert judge(measure(changed(effects, idle(3), spread=0.1))).flagged == (3, 4)


def test_of_fewer_than_three_challenges_none_stands_out():
    effects = {r: e for r, e in sound().items() if r.kind != "challenge" or r.layer in (2, 3)}
    assert judge(measure(changed(effects, {challenge(3): -10 * GAIN}))).flagged == ()


def test_a_challenge_that_diverged_is_left_out():
    run = measure(changed(sound(), {challenge(3): -10 * GAIN}))
    nan = (float("nan"),) * len(run.nll_eval)
    assert judge(rescored(run, challenge(5), nll_eval=nan)).flagged == (3,)
    assert judge(rescored(run, challenge(3), nll_eval=nan)).flagged == ()
