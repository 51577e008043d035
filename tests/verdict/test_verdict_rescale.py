"""A layer that other lengths of its matrices do far more for than for any other layer is flagged, and it alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulated import (
    changed,
    direct,
    foreign,
    identity,
    measure,
    rescale,
    score_of,
    sound,
)

from peelcli.records import Run
from peelcli.verdict import Policy, judge

TOLD = "o_proj × 0.71"


def noisy(layer: int, gains: dict[str | None, float], seed: int = 0) -> Run:
    """A sound network but for what rescaling one layer gains; layer 1 is worth three others."""
    run = measure(changed(sound(), {rescale(layer, part): -gain for part, gain in gains.items()}), seed=seed)
    scores = tuple(replace(s, fit=replace(s.fit, reason=TOLD)) for s in run.scores)
    return replace(run, scores=scores)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layer", [2, 3, 5])
def test_the_layer_that_gains_most_is_flagged_alone_with_its_factors(seed, layer):
    run = noisy(layer, {None: 0.02, "attention": 0.001, "mlp": 0.012}, seed)
    result = judge(run)
    assert result.flagged == (layer,)
    verdict = result.layers[layer - 1]
    assert (verdict.verdict, verdict.reference, verdict.sublayer) == ("surpassed", rescale(layer), "block")
    assert verdict.gap == pytest.approx(result.gap_of(rescale(layer)))
    assert verdict.gap_interval[0] > 0
    assert TOLD in verdict.reason
    assert "peel graft" in verdict.advice
    assert verdict.score > max(v.score for v in result.layers if v.layer != layer)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_sublayer_that_gains_as_much_as_the_block_is_to_blame(part):
    run = noisy(3, {None: 0.02, part: 0.02})
    assert [v.sublayer for v in judge(run).layers if v.verdict == "surpassed"] == [part]


@pytest.mark.parametrize("gain", [0.0, 0.003, 0.004])
def test_a_little_is_no_news(gain):
    assert judge(noisy(3, {None: gain})).flagged == ()


def test_nor_is_what_another_layer_gains_most_of():
    both = {rescale(3): -0.02, rescale(4): -0.015}
    assert judge(measure(changed(sound(), both))).flagged == ()


def test_a_layer_that_does_most_of_the_work_may_gain_more():
    """Dropping layer 1 costs 2.9 nats, and layer 3 .9: the same gain is news of the second alone."""
    gain = {None: 0.015}
    assert judge(noisy(1, gain)).flagged == ()
    assert judge(noisy(3, gain)).flagged == (3,)
    assert judge(noisy(1, gain), Policy(rescale_worth=0.0)).flagged == (1,)
    assert judge(noisy(1, {"attention": 0.015})).flagged == ()


def test_foreign_text_and_two_layers_are_no_measure():
    assert judge(foreign(noisy(3, {None: 0.05}))).flagged == ()
    few = measure(changed(sound(2, ladder=False), {rescale(2): -0.05}), num_layers=2)
    assert judge(few).flagged == ()


def test_where_another_layer_is_hurt_it_is_not_blamed():
    effects = changed(sound(), {identity(2, "attention"): -0.06}, divergence=0.2)
    run = measure(changed(effects, {rescale(4): -0.02}))
    assert judge(run).flagged == (2,)


def test_what_does_better_dropped_and_better_still_rescaled_is_told_both():
    effects = changed(sound(), {identity(2): -0.06, direct(2): -0.05}, divergence=0.2)
    run = measure(changed(effects, {rescale(2): -0.3}))
    fit = replace(score_of(run, rescale(2)).fit, reason="q_proj × 0.50")
    run = replace(
        run, scores=tuple(replace(s, fit=fit) if s.reference == rescale(2) else s for s in run.scores)
    )
    (verdict,) = [v for v in judge(run).layers if v.verdict == "surpassed"]
    assert verdict.reference == identity(2)
    assert "q_proj × 0.50" in verdict.notes[0]
