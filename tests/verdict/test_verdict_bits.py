"""A layer's own bits: what may surpass it, what may match it, and how few would do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated import BITS, LADDER, PARTS, Effect, changed, direct, identity, idle, measure, score_of, sound

from peelcli.verdict import judge

TERNARY = (BITS["ternary"],) * 5
# Bits of a layer are a mean over its matrices, and differ from the scheme's in the last places.
ROUNDED = [(t, t * (1 + 2e-16), t * (1 - 2e-16), t + 1e-15, t - 1e-15) for t in [BITS["ternary"]]]


def test_a_reference_of_more_bits_than_the_layer_never_flags():
    better = changed(sound(), {direct(3, p): -0.2 for p in (None, "attention", "mlp")}, divergence=0.3)
    run = measure(better)
    assert judge(run).flagged == (3,)
    assert judge(replace(run, layer_bits=(1.0,) * 5)).flagged == ()
    as_good = changed(sound(), {direct(3, p): 0.0 for p in (None, "attention", "mlp")}, spread=0.1)
    assert judge(measure(as_good)).flagged == (3,)
    assert judge(measure(as_good, layer_bits=(32.0, 32.0, 1.0, 32.0, 32.0))).flagged == ()


@pytest.mark.parametrize("bits", [TERNARY, *ROUNDED])
def test_warm_in_its_own_scheme_a_reference_is_the_layer_and_proves_nothing(bits):
    """Every layer is ternary, and its warm ternary reference costs nothing, for it is the layer."""
    own = {direct(n, p): 0.0 for n in range(1, 6) for p in (None, "attention", "mlp")}
    itself = changed(sound(ladder=False), own, spread=0.0)
    result = judge(measure(itself, layer_bits=bits))
    assert result.flagged == ()
    assert {v.verdict for v in result.layers} == {"effective"}
    assert all(v.score < 0.9 for v in result.layers)


@pytest.mark.parametrize("bits", {BITS["ternary"], *ROUNDED[0]})
def test_the_one_ternary_layer_of_a_network_is_not_idle_for_being_itself(bits):
    """In the other layers the ternary reference costs its usual; here it is the layer, and costs nothing."""
    itself = changed(sound(), {direct(3, p): 0.0 for p in PARTS}, spread=0.0)
    run = measure(itself, layer_bits=(32.0, 32.0, bits, 32.0, 32.0))
    assert {v.verdict for v in judge(run).layers} == {"effective"}
    assert judge(run).layers[2].score < 0.9
    assert judge(replace(run, layer_bits=(32.0,) * 5)).flagged == (3,)


def test_free_weights_are_no_match_for_one_layer_either():
    """Fitted as long as the others, and at layer 3 left as they were: still the layer itself."""
    effects = {identity(n): Effect(0.9, start="none") for n in range(1, 6)}
    effects |= {direct(n, None, "fp"): Effect(0.0 if n == 3 else 0.02, spread=0.1) for n in range(1, 6)}
    assert judge(measure(effects, scheme="fp")).flagged == ()


@pytest.mark.parametrize("bits", [TERNARY, *ROUNDED])
def test_fresh_in_its_own_scheme_a_reference_matches_an_idle_layer(bits):
    fresh = {
        r: replace(e, start="fresh" if r.kind == "direct" else e.start)
        for r, e in sound(ladder=False).items()
    }
    costs = {direct(3, p): 0.0 for p in (None, "attention", "mlp")}
    result = judge(measure(changed(fresh, costs, spread=0.1), layer_bits=bits))
    assert result.flagged == (3,)
    assert result.layers[2].reference.kind == "direct"
    assert judge(measure(fresh, layer_bits=bits)).flagged == ()


@pytest.mark.parametrize("bits", [TERNARY, *ROUNDED])
def test_warm_in_its_own_scheme_a_reference_may_still_surpass(bits):
    better = changed(sound(ladder=False), {direct(3): -0.1}, divergence=0.2)
    result = judge(measure(better, layer_bits=bits))
    assert result.flagged == (3,)
    assert result.layers[2].verdict == "surpassed"


def test_free_weights_that_start_from_the_trained_ones_are_the_layer():
    effects = {identity(n): Effect(0.9, start="none") for n in range(1, 6)}
    effects |= {
        direct(n, p, "fp"): Effect(1e-7 * n, spread=0.0)
        for n in range(1, 6)
        for p in (None, "attention", "mlp")
    }
    result = judge(measure(effects, scheme="fp"))
    assert {v.verdict for v in result.layers} == {"effective"}


@pytest.mark.parametrize("cost", [-0.3, 0.0])
def test_the_ladder_never_flags(cost):
    effects = changed(sound(), {direct(3, None, s): cost for s in LADDER}, divergence=0.0, spread=0.1)
    result = judge(measure(effects))
    assert result.flagged == ()
    assert result.layers[2].verdict == "effective"
    assert result.layers[2].effective_bits == 1.0


@pytest.mark.parametrize(
    ("enough", "bits"),
    [
        (["int8"], 8),
        (["int4", "int8"], 4),
        (["int3", "int4", "int8"], 3),
        (["binary", "int8"], 1),
        ([], None),
    ],
)
def test_effective_bits_are_those_of_the_cheapest_rung_that_matches(enough, bits):
    costs = {direct(3, None, s): 0.001 if s in enough else 0.2 for s in LADDER}
    assert judge(measure(changed(sound(), costs, spread=0.05))).layers[2].effective_bits == bits


def test_effective_bits_of_an_idle_layer_are_none_at_all():
    verdict = judge(measure(changed(sound(), idle(2), spread=0.1))).layers[1]
    assert verdict.effective_bits == 0
    assert verdict.own_bits == 32


def test_own_bits_are_of_the_layer_not_of_its_place_among_the_audited():
    effects = sound(layers=(3, 4, 5))
    bits = (1.0, 2.0, 3.0, 4.0, 5.0)
    result = judge(measure(effects, layers=(3, 4, 5), layer_bits=bits))
    assert [v.own_bits for v in result.layers] == [3.0, 4.0, 5.0]


def test_the_facts_are_those_that_were_measured():
    run = measure(sound())
    verdict = judge(run).layers[1]
    dropped = np.mean(score_of(run, identity(2)).nll_eval) - np.mean(run.nll_eval)
    assert verdict.drop_cost == pytest.approx(dropped)
    assert verdict.fvu == 0.3
