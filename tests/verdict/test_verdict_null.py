"""How often sampling noise alone flags: at most about one run in twenty, in the least favourable sound network."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import Effect, challenge, changed, direct, foreign, identity, measure, rescale, sound

from peelcli.verdict import Policy, judge
from peelcli.verdict.statistics import p_greater

RUNS = 120
# 5 % of 120 runs is 6; a binomial with that mean exceeds 13 in fewer than 4 of 1000 trials.
MOST = 13


def at_the_border(num_layers: int) -> dict:
    """Eight references a layer whose true gap is exactly 0 while they change the predictions."""
    references = [
        make(n, p)
        for n in range(1, num_layers + 1)
        for make in (identity, direct)
        for p in (None, "attention", "mlp")
    ]
    references += [direct(n, None, s) for n in range(1, num_layers + 1) for s in ("binary", "int4")]
    return {r: Effect(0.0, divergence=0.3) for r in references}


@pytest.mark.parametrize("num_layers", [5, 12])
def test_noise_surpasses_in_no_more_runs_than_promised(num_layers):
    effects = at_the_border(num_layers)
    flagged, naive = 0, 0
    for seed in range(RUNS):
        run = measure(effects, num_layers=num_layers, seed=seed)
        flagged += bool(judge(run, Policy(surpassed_floor=0.0)).flagged)
        gaps = [np.subtract(run.nll_eval, s.nll_eval) for s in run.scores]
        naive += p_greater(max(gaps, key=lambda g: g.mean())) < 0.05
    assert flagged <= MOST
    assert naive > RUNS / 3  # the same noise, with the best chosen and read on the same tokens


def test_noise_matches_in_no_more_runs_than_promised():
    """One layer of eight at exactly the margin: dropping it costs a tenth of what dropping another does."""
    effects = sound(8, ladder=False)
    worth = {r: e.cost for r, e in effects.items()}

    def border(make, part, share):
        others = sorted(worth[make(n, part)] for n in range(1, 9) if n != 4)
        return share * others[3]

    shares = [(identity, None, 0.10), (identity, "attention", 0.10), (identity, "mlp", 0.10)]
    shares += [(direct, None, 0.15), (direct, "attention", 0.10), (direct, "mlp", 0.10)]
    costs = {make(4, part): border(make, part, share) for make, part, share in shares}
    effects = changed({r: e for r, e in effects.items() if r.kind != "span"}, costs)
    flagged = [judge(measure(effects, num_layers=8, seed=seed)).flagged for seed in range(RUNS)]
    assert sum(map(bool, flagged)) <= MOST
    cheaper = changed(effects, dict.fromkeys(costs, 0.0), spread=0.2)
    assert judge(measure(cheaper, num_layers=8)).flagged == (4,)


def test_noise_challenges_in_no_more_runs_than_promised():
    """One layer gains exactly twice what the others gain, which is what it must exceed."""
    effects = {r: e for r, e in sound(6, ladder=False).items() if r.kind != "span"}
    border = changed(effects, {challenge(n): -0.18 if n == 3 else -0.09 for n in range(1, 7)})
    flagged = sum(bool(judge(measure(border, num_layers=6, seed=seed)).flagged) for seed in range(RUNS))
    assert flagged <= MOST


def test_on_foreign_text_the_choice_by_divergence_is_paid_for():
    """Six references at the margin of divergence: the least of six is below it by chance more often than any one."""
    effects = {r: e for r, e in sound(3, ladder=False).items() if r.kind in ("identity", "direct")}
    effects = {r: Effect(0.5, divergence=1.0) for r in effects}
    shares = {("identity", None): 0.10, ("direct", None): 0.15}
    border = {
        r: Effect(0.5, divergence=shares.get((r.kind, r.sublayer), 0.10)) if r.layer == 2 else e
        for r, e in effects.items()
    }
    several = sum(
        bool(judge(foreign(measure(border, num_layers=3, seed=seed))).flagged) for seed in range(3 * RUNS)
    )
    assert several <= 0.05 * 3 * RUNS


def test_chance_rescales_in_no_more_runs_than_promised():
    """Every layer gains just what a layer must, and no more than any other: one of eight stands out by chance alone."""
    effects = {rescale(n, part): Effect(-0.008, spread=0.5) for n in range(1, 9) for part in (None, "mlp")}
    policy = Policy(rescale_floor=0.0, rescale_factor=1.0)
    effects = sound(8, ladder=False) | effects
    flagged = [judge(measure(effects, num_layers=8, seed=seed), policy).flagged for seed in range(RUNS)]
    assert sum(map(bool, flagged)) <= MOST
