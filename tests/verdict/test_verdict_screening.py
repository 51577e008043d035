"""What a part of `eval` settles would decide nothing on all of it, and most is settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import changed, direct, exchange, foreign, identity, idle, measure, rescale, rescored, sound

from peelcli.records import Reference, Run, Score
from peelcli.verdict import SCREENED, Policy, judge, settled

STRIDE = 4


def cut(score: Score) -> Score:
    """The score as it is measured on a part."""
    part = {"nll_eval": score.nll_eval[::STRIDE], "kl_eval": score.kl_eval[::STRIDE]}
    return replace(score, nll_select=(), **part)


def settled_of(run: Run) -> set[str]:
    """The references of a run that a part of it settles."""
    parts = [cut(s) for s in run.scores if s.reference.kind in SCREENED]
    return settled(parts, run.nll_eval, run.unigram_ce, run.num_layers, Policy())


def screened(run: Run) -> Run:
    """The run as it would have been measured."""
    keys = settled_of(run)
    return replace(run, scores=tuple(cut(s) if s.reference.key in keys else s for s in run.scores))


def harmful(layer: int) -> dict[Reference, float]:
    """The costs of a layer whose attention had better be dropped."""
    return {identity(layer, "attention"): -0.08, direct(layer, "attention"): -0.06}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.0, 0.06),
    st.integers(1, 5),
    st.sampled_from(["none", "idle", "idle part", "harmful", "rescaled"]),
)
def test_nothing_that_decides_is_settled(seed: int, noise: float, layer: int, fault: str) -> None:
    faults: Mapping[str, Mapping[Reference, float]] = {
        "none": {},
        "idle": idle(layer),
        "idle part": idle(layer, part="mlp"),
        "harmful": harmful(layer),
        "rescaled": {rescale(layer, part): -0.06 for part in (None, "mlp")},
    }
    effects = sound(ladder=False)
    costs = {r: cost for r, cost in faults[fault].items() if r in effects}
    run = measure(changed(effects, costs), seed=seed, noise=noise)
    keys, whole = settled_of(run), judge(run)
    assert not {v.reference.key for v in whole.layers if v.layer in whole.flagged and v.reference} & keys
    # Margins are shares of what the others cost, which is measured on less: what is near its margin may go over.
    if noise < 0.03:
        assert judge(screened(run)).flagged == whole.flagged


def test_most_of_a_sound_network_is_settled() -> None:
    run = measure(sound(ladder=False))
    asked = [s for s in run.scores if s.reference.kind in SCREENED]
    assert len(settled_of(run)) > 0.8 * len(asked)


@pytest.mark.parametrize("cost", [-0.02, 0.0, 0.05, 0.2])
def test_what_may_match_or_surpass_is_not(cost: float) -> None:
    """Dropping another attention costs .2 as a rule: a margin is a tenth of that."""
    run = measure(changed(sound(ladder=False), {identity(3, "attention"): cost}))
    assert (identity(3, "attention").key in settled_of(run)) == (cost == 0.2)


def test_equal_losses_of_other_predictions_are_not_settled_by_the_loss_alone() -> None:
    """On foreign text it is the divergence that a match is told by."""
    run = foreign(measure(sound(ladder=False)))
    score = next(s for s in run.scores if s.reference == direct(3))
    calm = rescored(run, direct(3), kl_eval=tuple(0.1 * np.asarray(score.kl_eval)))
    assert direct(3).key in settled_of(run)
    assert direct(3).key not in settled_of(calm)


def test_an_exchange_that_may_gain_and_the_stack_are_measured_on_all() -> None:
    effects = sound(ladder=False)
    like = effects[identity(1)]
    effects |= {exchange(n): replace(like, cost=c) for n, c in ((1, 2.0), (2, -0.1), (3, 0.0))}
    keys = settled_of(measure(effects))
    assert [exchange(n).key in keys for n in (1, 2, 3)] == [True, False, False]
    assert identity(1, target=5).key not in keys


def test_a_rescale_that_may_count_keeps_those_it_is_set_beside() -> None:
    run = measure(changed(sound(ladder=False), {rescale(2, "mlp"): -0.03}))
    keys = settled_of(run)
    assert not {rescale(n, "mlp").key for n in range(1, 6)} & keys
    assert {rescale(n, "attention").key for n in range(1, 6)} <= keys


def test_of_two_layers_nothing_is_settled_by_what_the_other_costs() -> None:
    run = measure(sound(2, ladder=False), num_layers=2)
    kinds = {key.partition("-")[0] for key in settled_of(run)}
    assert kinds <= {"exchange", "rescale"}
