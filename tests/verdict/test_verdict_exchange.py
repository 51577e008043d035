"""Two layers that do better in each other's place are both flagged; what is hurt itself is no matter of order."""

from __future__ import annotations

import pytest
from simulated import Effect, changed, exchange, foreign, identity, measure, sound

from peelcli.verdict import judge

RIGHT = {exchange(n): Effect(0.9, start="none") for n in range(1, 5)}


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_both_layers_of_the_pair_are_flagged_and_no_other(first, seed):
    run = measure(changed(sound() | RIGHT, {exchange(first): -0.06}, spread=0.3), seed=seed)
    result = judge(run)
    assert result.flagged == (first, first + 1)
    for layer in result.flagged:
        verdict = result.layers[layer - 1]
        assert (verdict.verdict, verdict.reference, verdict.sublayer) == (
            "surpassed",
            exchange(first),
            "block",
        )
        assert verdict.gap == pytest.approx(result.gap_of(exchange(first)))
        assert verdict.gap_interval[0] > 0
        assert f"layers {first} and {first + 1} in each other's place" in verdict.reason
        assert "peel graft" in verdict.advice
        assert verdict.score > max(v.score for v in result.layers if v.layer not in result.flagged)


@pytest.mark.parametrize("cost", [-0.001, 0.0, 0.01, 2.0])
def test_exchanges_that_do_no_better_change_nothing(cost):
    with_them = measure(sound() | changed(RIGHT, {exchange(2): cost}, spread=0.05))
    without = judge(measure(sound()))
    assert judge(with_them).flagged == ()
    assert [v.verdict for v in judge(with_them).layers] == [v.verdict for v in without.layers]


def test_a_layer_that_does_better_dropped_is_hurt_itself_and_its_neighbour_is_not_blamed():
    effects = changed(sound() | RIGHT, {identity(3, "attention"): -0.08}, divergence=0.2)
    effects = changed(effects, {exchange(3): -0.04}, spread=0.3)
    result = judge(measure(effects))
    assert result.flagged == (3,)
    assert result.layers[2].reference == identity(3, "attention")


def test_of_pairs_that_overlap_the_better_one_is_blamed():
    effects = changed(sound() | RIGHT, {exchange(2): -0.09, exchange(3): -0.03}, spread=0.3)
    assert judge(measure(effects)).flagged == (2, 3)


def test_foreign_text_asks_for_more():
    run = measure(changed(sound() | RIGHT, {exchange(2): -0.06}, spread=0.3))
    assert judge(foreign(run)).flagged == ()


@pytest.mark.parametrize(("gain", "flagged"), [(0.05, (1, 2)), (0.4, (1, 2, 4))])
def test_what_does_better_behind_a_pair_in_the_wrong_order_is_put_down_to_it(gain, flagged):
    """Measured: layers 1 and 4 exchanged, 1.06 nats, and an attention between them does better dropped by .18."""
    effects = changed(sound() | RIGHT, {identity(4, "attention"): -gain}, divergence=0.2)
    effects = changed(effects, {exchange(1): -0.5}, spread=0.3)
    result = judge(measure(effects))
    assert result.flagged == flagged
    if flagged == (1, 2):
        assert "layer 1 is hurt" in result.layers[3].reason
