"""The zone of the network: its loss against those of the networks that were peeled from it.

    red      the last-target map [K, …, K] does better: training is ineffective
    yellow   the best map does better, or the network's own blocks under a refitted head do so by more than the text
             explains: a better network of the class is at hand
    green    neither

("Trust, but Verify", arXiv 2605.02853.) The best map is chosen on `select` and read on `eval`. A head that is refitted
can beat the trained network by itself, so that a map counts only by what it has beyond the trained blocks under a
refitted head: the lesser of the two gaps counts.

What that control gains is adaptation to the text as a rule, and then no more than the loss exceeds the network's own
uncertainty (measured: .09 of .30 nats on a real 5-layer model, .19 of .53 on one that had overfitted its 100,000
tokens). A network that was trained with a hundredth of the learning rate gained .38, while its loss lay .70 *below* its
uncertainty: it is unconverged, however flat its loss curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from peelcli.records import AuditResult, Bound, Bounds, PathScore, Run
from peelcli.verdict.evidence import foreign_allowance
from peelcli.verdict.policy import Policy
from peelcli.verdict.statistics import holm, p_greater, paired_interval, running_minimum


@dataclass(frozen=True)
class PathsVerdict:
    """The zone, None where too little is known; whether the head alone shows that training has not converged."""

    zone: str | None = None
    bounds: Bounds | None = None
    unconverged: bool = False

    @property
    def rules(self) -> tuple[str, ...]:
        """What the bounds show: "unconverged", then "red" or "yellow", where a path's own gap says so."""
        bounds = self.bounds
        if bounds is None:
            return ()
        is_red = self.zone == "red" and bounds.last is not None
        is_yellow = self.zone == "yellow" and bounds.yes.gap_interval[0] > bounds.threshold
        shown = {"unconverged": self.unconverged, "red": is_red, "yellow": is_yellow}
        return tuple(rule for rule, holds in shown.items() if holds)


def judge_paths(run: Run, policy: Policy, mismatch: float) -> PathsVerdict:
    """The zone of a run and the bounds it rests on. mismatch: loss less predictive entropy, nats per token."""
    if run.paths is None or len(run.nll_eval) < 2 or not np.isfinite([*run.nll_select, *run.nll_eval]).all():
        return PathsVerdict()
    control = run.paths.control
    scores = [s for s in run.paths.scores if np.isfinite([*s.nll_select, *s.nll_eval]).all()]
    if not scores or not np.isfinite([*control.nll_select, *control.nll_eval]).all():
        return PathsVerdict()
    best = min(scores, key=lambda s: (float(np.mean(s.nll_select)), s.target_map))
    last = next((s for s in scores if set(s.target_map) == {run.num_layers}), None)
    threshold = max(policy.surpassed_floor, foreign_allowance(policy, mismatch))
    head = np.subtract(run.nll_eval, control.nll_eval)
    interval = paired_interval(head.tolist(), policy.confidence)
    allowance = max(policy.head_floor, mismatch)
    bounds = Bounds(
        control=float(np.mean(control.nll_eval)),
        head_gap=interval.mean,
        head_interval=(interval.low, interval.high),
        head_allowance=allowance,
        yes=_bound(run, best, policy),
        last=_bound(run, last, policy) if last else None,
        beaten=sum(float(np.mean(s.nll_eval)) > float(np.mean(run.nll_eval)) for s in scores),
        peeled=len(scores),
        threshold=threshold,
    )
    if len(run.nll_eval) < policy.min_sequences:
        return PathsVerdict(None, bounds)
    p_values = {
        "red": _p_value(run, last, threshold) if last is not None else 1.0,
        "yellow": _p_value(run, best, threshold),
        "unconverged": p_greater(head.tolist(), allowance),
    }
    shown = dict(zip(p_values, holm(list(p_values.values()), 1.0 - policy.confidence), strict=True))
    zone = "red" if shown["red"] else "yellow" if shown["yellow"] or shown["unconverged"] else "green"
    return PathsVerdict(zone, bounds, shown["unconverged"])


def _gaps(run: Run, score: PathScore) -> tuple[np.ndarray, np.ndarray]:
    """What the path gains on each sequence of `eval` over the trained network, and over the head control."""
    assert run.paths is not None
    reached = np.asarray(score.nll_eval)
    return np.asarray(run.nll_eval) - reached, np.asarray(run.paths.control.nll_eval) - reached


def _bound(run: Run, score: PathScore, policy: Policy) -> Bound:
    lesser = min(_gaps(run, score), key=lambda gap: float(gap.mean()))
    interval = paired_interval(lesser.tolist(), policy.confidence)
    ends = (interval.low, interval.high)
    return Bound(score.target_map, float(np.mean(score.nll_eval)), interval.mean, ends)


def _p_value(run: Run, score: PathScore, threshold: float) -> float:
    return max(p_greater(gap.tolist(), threshold) for gap in _gaps(run, score))


def with_running_minimum(results: Sequence[AuditResult]) -> list[AuditResult]:
    """The results of a run's checkpoints, oldest first, each with the least YES bound up to it.

    It is of networks that exist, one of them at each earlier checkpoint, and so stays achievable. Networks of another
    shape have nothing to do with it: where the results are not of one run they stay as they are.
    """
    if len({(result.run.family, result.run.num_layers) for result in results}) > 1:
        return list(results)
    of_all = [result.network.bounds for result in results]
    least = running_minimum(math.nan if bounds is None else bounds.yes.ce for bounds in of_all)
    return [
        result
        if bounds is None
        else replace(result, network=replace(result.network, bounds=replace(bounds, running_minimum=so_far)))
        for result, bounds, so_far in zip(results, of_all, least, strict=True)
    ]
