"""What changed from one night to the next: nothing by chance, and a layer that stopped learning by its number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulated import Effect, changed, direct, foreign, identity, idle, measure, rescored, sound

from peelcli.records import AuditResult, Finding, LayerChange, Reference, Run
from peelcli.verdict import Policy, judge, with_comparisons
from peelcli.verdict.statistics import paired_interval

REGRESSED = Policy(fail_on=("regressed",))


def night(
    effects: Mapping[Reference, Effect] | None = None, seed: int = 0, moved: int = 1, **fields: Any
) -> Run:
    """A run of five layers; `moved` stands for how far training has come, which every layer's hash depends on."""
    hashes = {str(n): f"{n}-{moved}" for n in range(1, 6)}
    described = {"data_hash": "a", "layer_hashes": hashes, "checkpoint_id": f"id-{moved}", **fields}
    return measure(effects or sound(ladder=False), seed=seed, **described)


def compared(*runs: Run, policy: Policy = REGRESSED, baseline: Run | None = None) -> AuditResult:
    """The newest of the runs with what changed."""
    against = judge(baseline, policy) if baseline else None
    return with_comparisons([judge(run, policy) for run in runs], policy, against)[-1]


def change_of(result: AuditResult, layer: int) -> LayerChange:
    assert result.comparison is not None
    return next(change for change in result.comparison.layers if change.layer == layer)


def with_idle(layer: int) -> dict[Reference, Effect]:
    """A sound network, but for a layer that does nothing."""
    effects = sound(ladder=False)
    return changed(effects, {r: c for r, c in idle(layer).items() if r in effects}, spread=0.1)


def with_costs(factor: float, *layers: int) -> dict[Reference, Effect]:
    """A sound network in which everything that stands in for some layers costs `factor` of what it did."""
    effects = sound(ladder=False)
    costs = {r: e.cost * factor for r, e in effects.items() if r.layer in layers and r.kind != "challenge"}
    return changed(effects, costs)


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1, 0.3])
def test_two_nights_alike_are_hardly_ever_different_however_noisy(noise: float) -> None:
    """At most one pair in twenty, which is what 95% confidence allows; by the noise of one pair alone."""
    alarms = 0
    for seed in range(60):
        # Each night draws losses of its own, so that not even the pairing helps.
        n_eval = 8 + seed
        one, other = (night(seed=2 * seed + i, moved=1 + i, noise=noise, n_eval=n_eval) for i in (0, 1))
        result = compared(one, other)
        assert result.comparison is not None
        alarms += bool(result.comparison.regressed or result.flagged or result.network_flagged)
    assert alarms <= 3


@pytest.mark.parametrize("layer", [1, 3, 5])
def test_a_layer_that_stopped_learning_is_named_alone(layer: int) -> None:
    result = compared(night(), night(with_idle(layer), seed=1, moved=2))
    assert result.comparison is not None
    assert result.comparison.regressed == result.flagged == (layer,)
    change = change_of(result, layer)
    assert (change.status, change.before, change.after) == ("regressed", "effective", "matched")
    assert "matched now, and was effective" in change.reason
    verdict = next(v for v in result.layers if v.layer == layer)
    assert verdict.notes == (f"Regressed: {change.reason}",)


def test_the_interval_of_a_change_is_that_of_the_paired_differences() -> None:
    one, other = night(), night(seed=1, moved=2)
    result = compared(one, other)
    change = change_of(result, 2)
    assert change.reference is not None
    both = [next(s for s in run.scores if s.reference == change.reference) for run in (one, other)]
    gaps = [np.subtract(run.nll_eval, s.nll_eval) for run, s in zip((one, other), both, strict=True)]
    expected = paired_interval((gaps[1] - gaps[0]).tolist())
    assert change.gap_change == expected.mean
    assert change.gap_change_interval == (expected.low, expected.high)
    loss = paired_interval(np.subtract(other.nll_eval, one.nll_eval).tolist())
    assert result.comparison is not None
    assert result.comparison.ce_change == loss.mean


@pytest.mark.parametrize(
    ("factor", "status"), [(0.3, "regressed"), (0.8, "same"), (1.2, "same"), (2.0, "better")]
)
def test_what_counts_is_half_of_what_a_reference_cost(factor: float, status: str) -> None:
    result = compared(night(), night(with_costs(factor, 4), seed=1, moved=2))
    assert change_of(result, 4).status == status
    assert result.flagged == ((4,) if status == "regressed" else ())
    assert {change_of(result, n).status for n in (1, 2, 3, 5)} == {"same"}
    if status == "regressed":
        assert (
            next(v for v in result.layers if v.layer == 4).verdict == "effective"
        )  # known by the change alone


@pytest.mark.parametrize("cut", [(0,), (1,), (0, 1)])
def test_what_one_night_measured_on_fewer_sequences_is_compared_on_those(cut: tuple[int, ...]) -> None:
    """A reference that a part of `eval` settles has every fourth sequence alone."""
    runs = [night(), night(with_costs(0.05, 3), moved=2)]
    for i in cut:
        scores = tuple(
            replace(s, nll_select=(), nll_eval=s.nll_eval[::4], kl_eval=s.kl_eval[::4])
            if s.reference.kind != "challenge" and (s.reference.layer, s.reference.target) != (1, 5)
            else s
            for s in runs[i].scores
        )
        runs[i] = replace(runs[i], scores=scores)
    found = compared(*runs)
    change = change_of(found, 3)
    assert change.status == "regressed"
    assert found.comparison is not None
    assert found.comparison.regressed == (3,)
    then, now = (next(s for s in run.scores if s.reference == change.reference) for run in runs)
    fewest = min(len(then.nll_eval), len(now.nll_eval))
    assert fewest == 16
    gaps = [
        np.subtract(run.nll_eval[::4], s.nll_eval[:: len(s.nll_eval) // fewest])
        for run, s in zip(runs, (then, now), strict=True)
    ]
    assert change.gap_change == pytest.approx(float(np.mean(gaps[1] - gaps[0])))


def test_a_change_that_all_layers_share_blames_none() -> None:
    result = compared(night(), night(with_costs(0.3, 1, 2, 3, 4, 5), seed=1, moved=2))
    assert result.flagged == ()


def test_a_small_change_is_none_however_sure() -> None:
    """From 0.012 to 0.004 nats: a third, and less than a hundredth of a nat."""
    effects = sound(ladder=False)
    mine = [r for r in effects if r.layer == r.target == 3 and r.kind != "challenge"]
    one, other = ({**effects, **dict.fromkeys(mine, Effect(cost, spread=0.0))} for cost in (0.012, 0.004))
    result = compared(night(one), night(other, moved=2))
    assert change_of(result, 3).gap_change == pytest.approx(0.008)
    assert (change_of(result, 3).status, result.flagged) == ("same", ())
    other = {**effects, **dict.fromkeys(mine, Effect(0.0005, spread=0.0))}
    assert compared(night(one), night(other, moved=2)).flagged == (3,)  # where the floor is passed


def test_a_flag_that_was_there_is_not_new_and_one_that_is_gone_is_better() -> None:
    faulty = with_idle(3)
    again = compared(night(faulty), night(faulty, seed=1, moved=2))
    assert change_of(again, 3).after == "matched"
    assert again.flagged == ()
    healed = compared(night(faulty), night(seed=1, moved=2))
    assert (change_of(healed, 3).status, healed.flagged) == ("better", ())


def test_a_flag_without_a_change_in_its_figures_is_not_called_new() -> None:
    run = night()
    one, other = judge(run, REGRESSED), judge(replace(run, checkpoint_id="x"), REGRESSED)
    layers = tuple(replace(v, verdict="matched") if v.layer == 2 else v for v in other.layers)
    result = with_comparisons([one, replace(other, layers=layers)], REGRESSED)[-1]
    assert (change_of(result, 2).status, result.flagged) == ("same", ())
    assert "not changed enough to call that new" in change_of(result, 2).reason


# -- a layer that did not move -----------------------------------------------------------------------------------------


def frozen(run: Run, like: Run, *layers: int) -> Run:
    hashes = {n: like.layer_hashes[n] if int(n) in layers else h for n, h in run.layer_hashes.items()}
    return replace(run, layer_hashes=hashes)


def test_a_layer_that_alone_has_not_moved_has_stopped_learning() -> None:
    first, second = night(), night(seed=1, moved=2)
    result = compared(first, frozen(second, first, 2))
    assert (result.flagged, result.unmoved) == ((2,), (2,))
    assert "byte for byte what it was then" in change_of(result, 2).reason
    # Known to stand still the night before: not new. Nothing moved at all: the same weights, and no news of a layer.
    third = frozen(night(seed=2, moved=3), first, 2)
    assert compared(first, frozen(second, first, 2), third).flagged == ()
    still = compared(first, frozen(second, first, 1, 2, 3, 4, 5))
    assert (still.flagged, still.unmoved) == ((), ())
    same = compared(first, replace(first, checkpoint="elsewhere"))
    assert same.comparison is not None
    assert (same.flagged, same.comparison.notes) == ((), ("Both hold the same weights, byte for byte.",))
    assert all(change.gap_change == 0.0 for change in same.comparison.layers)


# -- what is missing, broken or not to be compared ---------------------------------------------------------------------


def test_a_missing_layer_fails_and_has_a_row_that_says_so() -> None:
    first, fewer = night(), night(sound(ladder=False, layers=(1, 2, 4)), seed=1, moved=2, layers=(1, 2, 4))
    result = compared(first, fewer)
    assert result.flagged == (3, 5)
    assert [v.layer for v in result.layers] == [1, 2, 3, 4, 5]
    assert {change_of(result, n).status for n in (3, 5)} == {"missing"}
    assert "is not now" in result.layers[2].reason
    more = compared(fewer, first)
    assert (more.flagged, change_of(more, 3).status) == ((), "new")


def broken(run: Run, layer: int) -> Run:
    """Nothing measured, as where a weight is not finite."""
    finding = Finding("non-finite", "a NaN", layer)
    return replace(
        run,
        nll_eval=(),
        nll_select=(),
        entropy_eval=(),
        scores=(),
        data_hash="",
        findings=(finding,),
        family="",
    )


def test_a_layer_that_broke_is_named_and_what_was_broken_compares_by_verdict() -> None:
    one, other = night(family="llama"), night(seed=1, moved=2, family="llama")
    result = compared(one, broken(other, 4))
    assert (result.flagged, change_of(result, 4).after) == ((4,), "broken")
    assert result.comparison is not None
    assert result.comparison.new_flags == ("broken",)
    back = compared(broken(one, 4), other)
    assert (back.flagged, change_of(back, 4).status) == ((), "better")


def test_fits_of_other_settings_are_compared_by_what_was_dropped() -> None:
    one = night(config={"fit": {"direct_steps": 40}})
    other = night(with_costs(0.3, 4), seed=1, moved=2, config={"fit": {"direct_steps": 10}})
    result = compared(one, other)
    assert result.comparison is not None
    assert {c.reference.kind for c in result.comparison.layers if c.reference} == {"identity"}
    assert result.flagged == (4,)
    assert any("fitted with other settings" in note for note in result.comparison.notes)


def test_losses_that_are_not_finite_are_not_compared() -> None:
    one = night()
    spoilt = rescored(night(seed=1, moved=2), identity(2), nll_eval=(np.nan,) * 64)
    result = compared(one, spoilt)
    assert result.flagged == ()
    assert change_of(result, 2).reference != identity(2)


def test_on_foreign_text_losses_that_swing_are_nothing() -> None:
    """What a reference does to the predictions stays, and its loss goes anywhere."""
    effects = sound(ladder=False)
    one = foreign(night(changed(effects, {direct(3): 0.2}, divergence=0.4)))
    other = foreign(night(changed(effects, {direct(3): 0.02}, divergence=0.4), seed=1, moved=2))
    result = compared(one, other)
    assert change_of(result, 3).status == "same"
    assert result.flagged == ()


def test_networks_of_another_shape_are_not_compared() -> None:
    small = measure(sound(3, ladder=False), num_layers=3, data_hash="a")
    assert compared(small, night()).comparison is None
    assert compared(night(family="llama"), night(family="gpt2")).comparison is None


def test_only_the_newest_flags_and_only_where_the_policy_says_so() -> None:
    faulty = with_idle(3)
    runs = [night(), night(faulty, seed=1, moved=2), night(seed=2, moved=3)]
    older, newest = with_comparisons([judge(r, REGRESSED) for r in runs], REGRESSED)[1:]
    assert (older.flagged, newest.flagged) == ((), ())
    assert older.comparison is not None
    assert older.comparison.regressed == (3,)
    assert compared(*runs[:2], policy=Policy(fail_on=("broken",))).flagged == ()
    # Against a baseline it is the baseline that counts, and not the run before.
    assert compared(*runs[:2], baseline=runs[1]).flagged == ()
    assert compared(runs[1], runs[1], baseline=runs[0]).flagged == (3,)
