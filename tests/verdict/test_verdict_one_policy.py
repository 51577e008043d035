"""What was screened under one policy is not judged under another on the part of `eval` that settled it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import direct, measure, sound
from test_verdict_screening import STRIDE, cut

from peelcli.errors import ArtefactError
from peelcli.records import Run
from peelcli.verdict import SCREENED, Policy, judge, screened_under, settled

LOOSE = 0.3  # nats: more than any attention costs to drop, or any ternary block


def fitted(run: Run, margin: float | None, *, stored: bool = True) -> Run:
    """The run as a fit under that margin measures it."""
    parts = [cut(s) for s in run.scores if s.reference.kind in SCREENED]
    policy = Policy(matched_margin=margin)
    keys = settled(parts, run.nll_eval, run.unigram_ce, run.num_layers, policy)
    scores = tuple(cut(s) if s.reference.key in keys else s for s in run.scores)
    config: dict[str, object] = {"fit": {"matched_margin": margin}} if stored else {}
    return replace(run, scores=scores, config=config)


def rests_on(run: Run) -> dict[str, int]:
    """On how many sequences each reference was measured."""
    return {s.reference.key: len(s.nll_eval) for s in run.scores}


def test_a_match_under_a_large_margin_is_decided_on_all_of_eval() -> None:
    run = fitted(measure(sound(ladder=False), noise=0.002), LOOSE)
    result = judge(run, Policy(matched_margin=LOOSE))
    matched = [v for v in result.layers if v.verdict == "matched"]
    assert matched
    assert {rests_on(run)[v.reference.key] for v in matched if v.reference} == {64}


@pytest.mark.parametrize("stored", [True, False])
def test_what_another_policy_settled_on_a_part_is_left_undecided_with_the_command(stored: bool) -> None:
    run = fitted(measure(sound(ladder=False), noise=0.002), None, stored=stored)
    assert judge(run).flagged == ()
    assert {v.verdict for v in judge(run).layers} == {"effective"}
    result = judge(run, Policy(matched_margin=LOOSE))
    assert {v.verdict for v in result.layers} == {"undecided"}
    for verdict in result.layers:
        assert "16 of 64 sequences of eval" in verdict.reason
        assert "--matched-margin 0.3" in verdict.reason
        assert "--matched-margin 0.3" in verdict.advice


def test_thresholds_that_no_option_sets_are_no_way_round_it() -> None:
    run = fitted(measure(sound(ladder=False), noise=0.002), None)
    loose = Policy(identity_share=2.0, fitted_share=2.0, sublayer_share=2.0, idle_share=2.0)
    result = judge(run, loose)
    assert {v.verdict for v in result.layers} == {"undecided"}
    assert all("--no-screen" in v.advice for v in result.layers)
    assert {v.verdict for v in judge(run, Policy(min_sequences=20)).layers} == {"undecided"}


def test_by_default_a_run_is_judged_under_the_policy_that_it_was_screened_under() -> None:
    run = fitted(measure(sound(ladder=False), noise=0.002), LOOSE)
    assert judge(run) == judge(run, Policy(matched_margin=LOOSE))
    assert screened_under(run).matched_margin == LOOSE
    assert screened_under(measure(sound(ladder=False), noise=0.002)) == Policy()


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([None, 0.0, 0.01, 0.3]),
    st.sampled_from([None, 0.0, 0.01, 0.1, 0.3, 5.0]),
    st.integers(0, 99),
)
def test_no_verdict_rests_on_a_part_where_the_policy_at_hand_would_have_measured_all(
    screened: float | None, asked: float | None, seed: int
) -> None:
    whole = measure(sound(ladder=False), noise=0.002, seed=seed)
    policy = Policy(matched_margin=asked)
    run, wanted = fitted(whole, screened), rests_on(fitted(whole, asked))
    parted = {key for key, n in rests_on(run).items() if n == 64 // STRIDE}
    for verdict, on_all in zip(judge(run, policy).layers, judge(whole, policy).layers, strict=True):
        key = verdict.reference.key if verdict.reference else ""
        assert not (key in parted and wanted[key] == 64)
        if verdict.verdict == "matched":
            assert on_all.verdict == "matched"


@pytest.mark.parametrize("margin", ["0.3", -1.0, float("nan"), float("inf"), True, 10**400, [0.3]])
def test_a_damaged_margin_is_refused(margin: object) -> None:
    run = replace(measure(sound(ladder=False), noise=0.002), config={"fit": {"matched_margin": margin}})
    with pytest.raises(ArtefactError, match="matched_margin"):
        judge(run)


def test_a_reference_of_the_ladder_has_a_part_under_any_policy() -> None:
    run = measure(sound())
    scores = tuple(cut(s) if s.reference.scheme not in (None, "ternary") else s for s in run.scores)
    result = judge(replace(run, scores=scores), Policy(matched_margin=0.001))
    assert direct(1, None, "int8").key in rests_on(run)
    assert {v.verdict for v in result.layers} == {"effective"}
