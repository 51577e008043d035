"""Untrained, broken, foreign, or only partly audited networks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated import Effect, changed, direct, foreign, identity, measure, sound

from peelcli.records import Finding
from peelcli.verdict import Policy, data_fit, judge


def random_network(num_layers: int, seed: int):
    """As measured on a random model: gaps of ±.003 to ±.02 of either sign, CE 6.25 beside 4.86 of token frequencies."""
    rng = np.random.default_rng(seed)
    effects = {
        r: replace(e, cost=rng.normal(0, 0.01), divergence=0.02)
        for r, e in sound(num_layers, ladder=False).items()
    }
    return measure(effects, num_layers=num_layers, seed=seed, noise=0.02, unigram_ce=1.73 - 1.4)


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_an_untrained_network_is_flagged_as_such_in_every_layer(num_layers, seed):
    result = judge(random_network(num_layers, seed))
    assert result.network.flags == ("untrained",)
    assert result.network_flagged
    assert result.flagged == tuple(range(1, num_layers + 1))
    assert all(
        v.sublayer == "block" and v.effective_bits == 0 and "untrained" not in v.reason for v in result.layers
    )
    assert any("untrained" in note for note in result.network.notes)


def test_a_network_is_not_untrained_that_beats_token_frequencies_or_needs_its_blocks():
    run = random_network(5, 0)
    assert "untrained" not in judge(replace(run, unigram_ce=4.86)).network.flags
    useful = measure(changed(sound(), {}), unigram_ce=0.3)  # worse than frequencies, as on foreign text
    assert "untrained" not in judge(useful).network.flags


def test_the_policy_says_whether_an_untrained_network_is_flagged():
    run = random_network(5, 1)
    only_network = judge(run, Policy(fail_on=("untrained",)))
    assert (only_network.flagged, only_network.network_flagged) == ((), True)
    nothing = judge(run, Policy(fail_on=("none",)))
    assert (nothing.flagged, nothing.network_flagged) == ((), False)


def test_values_that_are_not_finite_break_their_layer_and_leave_the_others_undecided():
    finding = Finding("non-finite", "tensor 'h.2.mlp.weight' (layer 3) holds 2 NaN", 3, "h.2.mlp.weight")
    for run in (measure(sound()), measure({}, nll_eval=(), nll_select=(), entropy_eval=())):
        result = judge(replace(run, findings=(finding,)))
        assert result.flagged == (3,)
        assert [v.verdict for v in result.layers] == [
            "undecided",
            "undecided",
            "broken",
            "undecided",
            "undecided",
        ]
        assert "h.2.mlp.weight" in result.layers[2].reason
        assert "broken" in result.network.flags
        assert result.network_flagged
        assert all(v.advice for v in result.layers)


def test_values_outside_the_layers_that_are_not_finite_break_the_network():
    finding = Finding("non-finite", "tensor 'lm_head.weight' holds 2 NaN", None, "lm_head.weight")
    result = judge(measure(sound(), findings=(finding,)))
    assert result.flagged == ()
    assert result.network_flagged
    assert {v.verdict for v in result.layers} == {"undecided"}


def test_a_duplicate_layer_is_broken_whatever_it_measures_and_others_are_judged():
    finding = Finding("duplicate-layer", "layer 4 is, byte for byte, layer 3", 4)
    result = judge(measure(sound(), findings=(finding,)))
    assert result.flagged == (4,)
    assert [v.verdict for v in result.layers] == ["effective"] * 3 + ["broken", "effective"]
    assert result.layers[3].reason == finding.message
    assert result.layers[3].notes
    assert result.layers[3].score > max(v.score for v in result.layers if v.layer != 4)


@pytest.mark.parametrize("kind", ["constant", "identical-layer", "identical-checkpoint", "surplus-layers"])
def test_other_findings_are_notes_and_flag_nothing(kind):
    result = judge(measure(sound(), findings=(Finding(kind, "said by the scan", 2),)))
    assert result.flagged == ()
    assert not result.network_flagged


@pytest.mark.parametrize("layers", [(3, 4, 5), (2,), (1, 5), (2, 3)])
def test_some_layers_alone_are_judged_as_soundly(layers):
    """The reference that drops every block is missing where layer 1 was not audited, and peers are few."""
    effects = sound(layers=layers)
    result = judge(measure(effects, layers=layers))
    assert tuple(v.layer for v in result.layers) == layers
    assert {v.verdict for v in result.layers} == {"effective"}
    fault = changed(
        effects, {make(layers[-1], p): 0.0 for make in (identity, direct) for p in (None, "mlp")}, spread=0.1
    )
    assert judge(measure(fault, layers=layers)).flagged == layers[-1:]


def test_a_layer_that_is_worth_less_than_the_first_is_not_idle_for_that():
    """The first layer is worth thirty others (2.28 beside .07 in a small model): it sets no margin for them."""
    for num_layers in (2, 3, 4):
        effects = {
            identity(n): Effect(2.28 if n == 1 else 0.07, start="none") for n in range(1, num_layers + 1)
        }
        effects |= {direct(n): Effect(0.2 if n == 1 else 0.0095) for n in range(1, num_layers + 1)}
        for seed in range(5):
            run = measure(effects, num_layers=num_layers, seed=seed, noise=0.004, unigram_ce=2.5)
            assert judge(run).flagged == ()


def test_text_is_foreign_where_the_loss_is_far_above_the_own_uncertainty():
    assert data_fit([1.73, 1.70], [1.43, 1.40]) == "own"
    assert data_fit([4.96, 5.0], [2.1, 2.2]) == "foreign"
    result = judge(foreign(measure(sound())))
    assert result.network.data_fit == "foreign"
    assert any("--data" in note for note in result.network.notes)
    assert judge(measure(sound())).network.data_fit == "own"


def test_the_loss_of_the_network_is_the_mean_over_sequences():
    run = measure(sound())
    network = judge(run).network
    assert network.ce == pytest.approx(np.mean(run.nll_eval))
    assert network.perplexity == pytest.approx(np.exp(np.mean(run.nll_eval)))
    assert network.entropy == pytest.approx(np.mean(run.entropy_eval))
