"""What cannot be said is not said: too few tokens, straddling intervals, fits that diverged or had not converged."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulated import Effect, changed, direct, foreign, identity, idle, measure, rescored, sizes, sound

from peelcli.records import Finding
from peelcli.verdict import Policy, judge


def test_too_few_sequences_decide_nothing_and_say_what_would():
    idle_network = changed(sound(), {identity(1, target=5): 0.0}, spread=0.01)
    run = measure(changed(idle_network, idle(3)), n_eval=7, n_select=4, unigram_ce=1.0)
    result = judge(run)
    assert {v.verdict for v in result.layers} == {"undecided"}
    assert all("7 sequences" in v.reason and "--tokens" in v.advice for v in result.layers)
    assert result.flagged == ()
    assert not result.network_flagged
    assert judge(run, Policy(min_sequences=7)).flagged


@pytest.mark.parametrize("n_eval", [0, 1])
def test_no_sequence_at_all_is_no_error(n_eval):
    result = judge(measure({}, n_eval=max(n_eval, 1), nll_eval=(2.0,) * n_eval, entropy_eval=(1.0,) * n_eval))
    assert {v.verdict for v in result.layers} == {"undecided"}


def test_an_interval_that_straddles_is_undecided_until_there_are_more_tokens():
    effects = changed(sound(), {identity(4): 0.04}, spread=8.0)
    small = {"weight_rms": sizes({4: 0.5})}
    few = judge(measure(effects, n_eval=10, n_select=8, **small)).layers[3]
    assert few.verdict == "undecided"
    assert "--tokens" in few.advice
    assert few.gap_interval[0] < -0.01 < few.gap_interval[1]
    assert judge(measure(effects, n_eval=1500, **small)).layers[3].verdict == "matched"
    dear = changed(sound(), {identity(4): 0.3}, spread=4.0)
    assert judge(measure(dear, n_eval=10, n_select=8)).layers[3].verdict == "undecided"
    assert judge(measure(dear, n_eval=400)).layers[3].verdict == "effective"


@pytest.mark.parametrize(("cost", "verdict"), [(0.035, "undecided"), (0.19, "effective")])
def test_a_fit_near_the_margin_that_had_not_converged_leaves_it_open(cost, verdict):
    """The margin is 15 % of .19, about .028."""
    effects = changed(sound(), {direct(3): cost}, converged=False, spread=0.1)
    small = {"weight_rms": sizes({3: 0.6})}
    found = judge(measure(effects, **small)).layers[2]
    assert found.verdict == verdict
    settled = measure(changed(sound(), {direct(3): cost}, spread=0.1), **small)
    assert judge(settled).layers[2].verdict == "effective"
    if verdict == "undecided":
        assert "--direct-steps" in found.advice
        assert found.reference == direct(3)


def test_a_match_needs_no_convergence():
    effects = changed(
        sound(), {direct(3, p): 0.0 for p in (None, "attention", "mlp")}, converged=False, spread=0.1
    )
    assert judge(measure(effects)).layers[2].verdict == "matched"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["nll_eval", "nll_select", "kl_eval"])
@pytest.mark.parametrize("text", ["own", "foreign"])
def test_a_reference_that_diverged_is_left_out_and_kills_no_verdict(bad, where, text):
    run = measure(changed(sound(), idle(3), spread=0.1))
    length = len(run.nll_select if where == "nll_select" else run.nll_eval)
    for reference in (direct(3), direct(2, "mlp"), identity(5)):
        run = rescored(run, reference, **{where: (bad,) + (1.0,) * (length - 1)})
    result = judge(foreign(run) if text == "foreign" else run)
    assert result.flagged == (3,)
    assert result.layers[1].verdict == "effective"
    assert result.layers[4].verdict == "effective"
    assert result.layers[4].drop_cost is None


def test_where_every_reference_diverged_the_layer_is_undecided_and_the_reason_says_so():
    run = measure(sound())
    nan = (float("nan"),) * len(run.nll_eval)
    scores = tuple(replace(s, nll_eval=nan) if s.reference.layer == 2 else s for s in run.scores)
    result = judge(replace(run, scores=scores))
    assert [v.verdict for v in result.layers].count("undecided") == 1
    assert result.layers[1].verdict == "undecided"
    assert "diverged" in result.layers[1].reason
    assert result.layers[1].advice


def test_without_any_reference_the_layer_is_undecided():
    effects = {r: e for r, e in sound().items() if r.layer != 2}
    found = judge(measure(effects)).layers[1]
    assert found.verdict == "undecided"
    assert "diverged" not in found.reason
    assert found.advice


def test_where_no_layer_is_worth_anything_none_is_called_effective():
    """A network that has learned nothing to speak of, and whose blocks still move the predictions."""
    references = [
        make(n, p) for n in range(1, 6) for make in (identity, direct) for p in (None, "attention", "mlp")
    ]
    run = measure({r: Effect(0.0, divergence=0.2) for r in references}, unigram_ce=1.7, noise=0.01)
    assert {v.verdict for v in judge(run).layers} == {"undecided"}


def test_losses_of_the_network_itself_that_are_not_finite():
    run = measure(sound())
    for field in ("nll_eval", "nll_select"):
        result = judge(replace(run, **{field: (float("nan"), *getattr(run, field)[1:])}))
        assert result.network.flags == ("broken",)
        assert result.network_flagged
        assert {v.verdict for v in result.layers} == {"undecided"}
        assert result.network.ce is None


def test_a_duplicate_is_broken_also_where_nothing_could_be_measured():
    finding = Finding("duplicate-layer", "layer 4 is, byte for byte, layer 3", 4)
    result = judge(measure(sound(), n_eval=4, n_select=4, findings=(finding,)))
    assert result.flagged == (4,)
    assert result.layers[3].reason == finding.message
