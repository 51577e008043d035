"""A rollback that does better proves that its layer is stale or got worse; whatever else it costs, it says nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated import (
    GAIN,
    Effect,
    challenge,
    changed,
    foreign,
    identity,
    idle,
    measure,
    rescored,
    rollback,
    score_of,
    sound,
)

from peelcli.records import Reference, Run
from peelcli.verdict import Policy, judge

STEPS = (200, 400)
HARD = {rollback(n, step): 0.02 * (600 - step) / 200 for n in range(1, 6) for step in STEPS}


def rolled(costs: dict[Reference, float] | None = None, spread: float = 0.05) -> dict[Reference, Effect]:
    """Rollbacks to two steps for every layer: blocks that hardly moved since the later one."""
    return {r: Effect(c, start="earlier", spread=spread) for r, c in (HARD | (costs or {})).items()}


def without_rollbacks(run: Run) -> Run:
    """The same draw, measured without them."""
    return replace(run, scores=tuple(s for s in run.scores if s.reference.kind != "rollback"))


@pytest.mark.parametrize("layer", [1, 3, 5])
@pytest.mark.parametrize("step", STEPS)
def test_a_layer_whose_older_block_does_better_is_flagged_alone(layer: int, step: int) -> None:
    for seed in range(3):
        run = measure(sound() | rolled({rollback(layer, step): -0.03}), seed=seed)
        result = judge(run)
        verdict = result.layers[layer - 1]
        assert result.flagged == (layer,)
        assert (verdict.verdict, verdict.sublayer) == ("surpassed", "block")
        assert verdict.reference == rollback(layer, step)
        assert verdict.gap == pytest.approx(result.gap_of(rollback(layer, step)))
        assert verdict.gap_interval[0] > 0
        assert verdict.score == max(v.score for v in result.layers)
        assert verdict.score > 1
        for words in (f"step {step}", f"{verdict.gap:.4f}"):
            assert words in verdict.reason
        for words in (f"step {step}", "Copy the checkpoint again", "peel graft"):
            assert words in verdict.advice


def test_a_checkpoint_that_does_not_tell_its_step_is_named_by_its_id() -> None:
    nameless = Reference("rollback", 3, 3, bits=32.0, origin_id="0123456789ab")
    verdict = judge(measure(sound() | {nameless: Effect(-0.03, spread=0.05)})).layers[2]
    assert "checkpoint 0123456789ab" in verdict.reason
    assert "checkpoint 0123456789ab" in verdict.advice


FAULTS = {
    "sound": sound(),
    "idle": changed(sound(), idle(3), spread=0.1),
    "harmful": changed(sound(), {identity(2, "attention"): -0.06}, divergence=0.2),
    "challenge": changed(sound(), {challenge(3): -4 * GAIN}),
}


@pytest.mark.parametrize("cost", [0.0, 1e-7, 0.0004, 0.02, 3.0])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("abroad", [False, True])
def test_rollbacks_that_do_no_better_change_nothing(cost: float, fault: str, abroad: bool) -> None:
    """However little they cost, they match nothing, are no peers, leave no doubt and are the closest to nothing."""
    effects = FAULTS[fault] | rolled(dict.fromkeys(HARD, cost), spread=0.01)
    run = measure(effects, noise=0.001)
    run = foreign(run) if abroad else run
    plain = without_rollbacks(run)
    for policy in (Policy(), Policy(matched_margin=0.05)):
        assert judge(run, policy).layers == judge(plain, policy).layers
        assert judge(run, policy).network == judge(plain, policy).network


def test_a_rollback_matches_nothing_whatever_bits_are_written_down_for_it() -> None:
    lighter = {rollback(n, bits=0.0): Effect(0.0, 0.0, spread=0.1, start="fresh") for n in range(1, 6)}
    result = judge(measure(lighter), Policy(matched_margin=0.05))
    assert {v.verdict for v in result.layers} == {"undecided"}
    assert {v.effective_bits for v in result.layers} == {None}


def test_rollbacks_alone_can_prove_and_cannot_clear() -> None:
    result = judge(measure(rolled({rollback(4, 400): -0.03})))
    assert [v.verdict for v in result.layers] == [*["undecided"] * 3, "surpassed", "undecided"]


def test_what_was_best_on_select_is_read_on_eval() -> None:
    run = measure(sound() | rolled({rollback(3, 400): -0.03}))
    assert judge(run).flagged == (3,)
    lucky = tuple(np.subtract(run.nll_select, 0.05))
    # The luckier one on `select` is read, and is no better on `eval`: that the other is, was not to be known.
    assert judge(rescored(run, rollback(3, 200), nll_select=lucky)).flagged == ()


def test_an_untrained_network_stays_matched_by_its_absence() -> None:
    nothing = {r: Effect(0.0, 0.0, start="none", spread=0.01) for r in sound() if r.kind == "identity"}
    better = rolled(dict.fromkeys(HARD, -0.03))
    result = judge(measure(nothing | better, unigram_ce=1.7))
    assert "untrained" in result.network.flags
    assert {v.verdict for v in result.layers} == {"matched"}
    assert all(v.reference is None or v.reference.kind == "identity" for v in result.layers)


def test_a_stale_layer_keeps_the_challenge_from_blaming_another() -> None:
    effects = changed(sound(), {challenge(3): -10 * GAIN}) | rolled({rollback(4, 400): -0.03})
    assert judge(measure(effects)).flagged == (4,)


def test_foreign_text_asks_for_more() -> None:
    """Any blunter network is less wrong on text that it does not know, and a block of an early step makes one."""
    for cost, flagged in ((-0.1, ()), (-0.3, (3,))):
        run = foreign(measure(sound() | rolled({rollback(3, 200): cost})))
        assert judge(run).flagged == flagged


def test_a_rollback_that_is_not_finite_is_left_out() -> None:
    run = measure(sound() | rolled())
    nan = (float("nan"),) * len(score_of(run, rollback(2)).nll_eval)
    broken = rescored(run, rollback(2), nll_eval=nan)
    assert judge(broken).layers == judge(without_rollbacks(run)).layers


def test_sound_series_are_flagged_no_more_often_than_promised() -> None:
    """Ten layers, two older blocks each that cost nothing at all: the best of them on `select` is mere luck."""
    flagged = 0
    for seed in range(60):
        effects = {rollback(n, step): Effect(0.0, start="earlier") for n in range(1, 11) for step in STEPS}
        run = measure(effects, num_layers=10, seed=seed, noise=0.02)
        flagged += bool(judge(run).flagged)
    assert flagged <= 7  # 5% of 60 are 3; more than 7 come about once in a hundred


@pytest.mark.parametrize("gain", [0.004, 0.015, 0.1])
def test_layers_that_all_gain_alike_are_not_flagged_and_the_network_note_says_so(gain: float) -> None:
    """A large learning rate: the last steps are noise to every block."""
    alike = {rollback(n, 400): -gain * (1 + 0.05 * n) for n in range(1, 6)}
    result = judge(measure(sound() | rolled(alike)))
    assert result.flagged == ()
    notes = [n for n in result.network.notes if "step 400" in n]
    assert bool(notes) == (gain > 0.01)
    for note in notes:
        assert "No single layer is flagged for that" in note
        assert float(note.split(" nats")[0].split()[-1]) == pytest.approx(1.15 * gain, rel=0.1)
    for factor, flagged in ((2.5, (4,)), (1.8, ())):
        worse = judge(measure(sound() | rolled(alike | {rollback(4, 400): -factor * 1.15 * gain})))
        assert worse.flagged == flagged


def test_that_the_others_lose_makes_no_gain_of_a_loss() -> None:
    for cost, flagged in ((0.01, ()), (-0.02, (3,))):
        costs = {rollback(n, 400): 0.3 for n in range(1, 6)} | {rollback(3, 400): cost}
        assert judge(measure(sound() | rolled(costs))).flagged == flagged


def test_a_step_at_which_all_gain_does_not_hide_one_at_which_the_layer_alone_does() -> None:
    alike = {rollback(n, 400): -0.03 for n in range(1, 6)}
    verdict = judge(measure(sound() | rolled(alike | {rollback(2, 200): -0.025}))).layers[1]
    assert verdict.verdict == "surpassed"
    assert verdict.reference == rollback(2, 200)


def test_half_of_the_layers_stale_are_all_found() -> None:
    stale = {rollback(n, 400): -0.03 for n in (2, 3)}
    assert judge(measure(sound() | rolled(stale))).flagged == (2, 3)


def test_with_too_few_layers_for_a_median_the_gap_alone_decides() -> None:
    pair = {r: e for r, e in rolled({rollback(n, 400): -0.03 for n in (2, 3)}).items() if r.layer in (2, 3)}
    assert judge(measure(sound() | pair)).flagged == (2, 3)


def test_the_luck_of_a_drop_on_select_does_not_hide_a_stale_layer() -> None:
    run = measure(sound() | rolled({rollback(3, 400): -0.03}))
    lucky = tuple(np.subtract(run.nll_select, 0.1))
    verdict = judge(rescored(run, identity(3, "attention"), nll_select=lucky)).layers[2]
    assert (verdict.verdict, verdict.reference) == ("surpassed", rollback(3, 400))


def test_where_something_else_decides_a_rollback_is_noted() -> None:
    effects = changed(sound(), {identity(2, "attention"): -0.08}, divergence=0.2, spread=0.2)
    plain, both = (judge(measure(effects | rolled(c))).layers[1] for c in ({}, {rollback(2, 400): -0.03}))
    assert both.reference == plain.reference == identity(2, "attention")
    assert plain.notes == ()
    (note,) = both.notes
    assert "step 400" in note
    assert "stale" in note
