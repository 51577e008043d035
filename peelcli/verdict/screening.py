"""Which references a part of `eval` settles: most cost so much that no more tokens could make them decide anything.

A reference flags a layer where it costs a small share of what the same kind costs other layers, or less than nothing.
One that a part of the sequences shows to be far from either stays measured on that part alone; every other is measured
on all of `select` and `eval`, and what is decided is decided by that: the choice inflates no error.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median_low

import numpy as np

from peelcli.errors import ArtefactError
from peelcli.records import Reference, Run, Score
from peelcli.verdict.evidence import even_share, group_of, is_usable
from peelcli.verdict.policy import Policy

# Each layer's challenge and rollback are set beside those of all others, whatever they gain.
SCREENED = ("identity", "direct", "span", "exchange", "rescale")


def screened_under(run: Run) -> Policy:
    """The policy by which the fit of a run chose what to measure on a part; the default where it names none.

    ArtefactError where what it names is no margin.
    """
    settings = run.config.get("fit")
    margin = settings.get("matched_margin") if isinstance(settings, dict) else None
    if margin is None:
        return Policy()
    if (
        isinstance(margin, bool)
        or not isinstance(margin, int | float)
        or not 0.0 <= margin <= sys.float_info.max
    ):
        raise ArtefactError(
            f"the fit of {run.checkpoint}: names a matched_margin that is no number of nats ({str(margin)[:40]!r}); "
            "make it anew with `peel fit`."
        )
    return Policy(matched_margin=float(margin))


def left_open(run: Run, policy: Policy) -> dict[str, Score]:
    """The references that were measured on a part of `eval` alone, and that `policy` would have measured on all of it.

    By their keys. No verdict may rest on them. None where the fit was screened under the same thresholds.
    """
    before = screened_under(run)
    if policy == replace(before, fail_on=policy.fail_on, confidence=policy.confidence):
        return {}
    total = len(run.nll_eval)
    asked = [
        s
        for s in run.scores
        if s.reference.kind in SCREENED and is_usable(s) and not s.reference.orders_schemes(run.scheme)
    ]
    parts = {s.reference.key: s for s in asked if len(s.nll_eval) < total}
    if not parts:
        return {}
    stride = max(s.stride(total) for s in parts.values())
    cut = [s if s.reference.key in parts else _cut(s, stride) for s in asked]
    keys = settled(cut, run.nll_eval, run.unigram_ce, run.num_layers, policy)
    return {k: s for k, s in parts.items() if k not in keys or len(s.nll_eval) < policy.min_sequences}


def _cut(score: Score, stride: int) -> Score:
    return replace(score, nll_eval=score.nll_eval[::stride], kl_eval=score.kl_eval[::stride])


def settled(
    scores: Sequence[Score], nll_eval: Sequence[float], unigram_ce: float, num_layers: int, policy: Policy
) -> set[str]:
    """The keys of the references that need not be measured any further.

    scores: as measured on the part. nll_eval: the run's own losses on all of `eval`.
    """
    least = policy.least_share * even_share(nll_eval, unigram_ce, num_layers)  # a usual cost, at least
    lowest, mean, kl = {}, {}, {}  # by reference; the lowest that cost and divergence can be
    for s in scores:
        cost = np.subtract(s.nll_eval, s.beside(nll_eval))
        lowest[s.reference] = (_low(cost, policy), _low(np.asarray(s.kl_eval), policy))
        mean[s.reference] = float(cost.mean())
        kl[s.reference] = float(np.mean(s.kl_eval))
    groups: dict[tuple[object, ...], list[Reference]] = {}
    for s in scores:
        groups.setdefault(group_of(s), []).append(s.reference)
    found: set[str] = set()
    for group in groups.values():
        if group[0].is_exchange:
            found |= {r.key for r in group if lowest[r][0] > -policy.surpassed_floor}
        elif group[0].kind == "rescale":  # each layer's is set beside the others'
            if all(lowest[r][0] > -policy.rescale_floor for r in group):
                found |= {r.key for r in group}
        else:
            found |= {r.key for r in group if _is_far(r, group, lowest, mean, kl, least, policy)}
    return found


def _is_far(
    reference: Reference,
    group: Sequence[Reference],
    lowest: Mapping[Reference, tuple[float, float]],
    mean: Mapping[Reference, float],
    kl: Mapping[Reference, float],
    least: float,
    policy: Policy,
) -> bool:
    """Whether it costs a good share of what its peers at other layers do, by the loss and by the predictions.

    That is more than a match may cost, or a fit that has not converged, under the policy at hand.
    """
    others = [r for r in group if r.layer != reference.layer]
    if len(others) < 2:
        return False
    cost, divergence = lowest[reference]
    usual = max(least, median_low([mean[r] for r in others]))
    usual_kl = median_low([kl[r] for r in others])
    idle = policy.untouched_factor * max(policy.identity_share, policy.sublayer_share)
    share = max(policy.screening_share, policy.unsettled_factor * max(idle, policy.fitted_share))
    # A margin in nats is what a match may cost whatever is usual, in loss or (on foreign text) in divergence.
    margin = max(policy.unsettled_factor, policy.divergence_factor) * (policy.matched_margin or 0.0)
    return cost > max(share * usual, margin) and divergence > max(share * usual_kl, margin)


def _low(values: np.ndarray, policy: Policy) -> float:
    return float(values.mean() - policy.screening_errors * values.std(ddof=1) / math.sqrt(len(values)))
