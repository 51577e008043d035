"""What each reference says about its layer: its gap, and its cost against that of its peers at other layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from peelcli.records import Reference, Run, Score
from peelcli.statistics import Interval, p_greater, p_less, paired_interval
from peelcli.verdict.policy import Policy

STATE_KINDS = ("identity", "direct", "span")  # they aim at the model's own states, not at the text
_SAME_BITS = 1e-6  # bits of a layer are a mean over its matrices, and round


@dataclass(frozen=True)
class Evidence:
    """One reference against the trained layer, on the same tokens. Costs are losses added; gaps are −costs."""

    score: Score
    cost: Interval  # on `eval`: CE, or on foreign text the divergence from the trained model
    gap: Interval  # on `eval`, always CE
    cost_select: float
    gap_select: float
    divergence: float  # KL(trained ‖ with the reference) on `eval`
    margin: float  # what a match may cost
    usual: float  # what the same reference costs the other layers, or what stands in for that
    from_peers: bool  # whether `usual` is the lower median over the other layers
    vacuous: bool  # a fit that costs next to nothing at any layer: in so many bits a match says nothing
    gap_threshold: float  # what a gap must exceed to count as surpassing
    p_surpassed: float
    p_matched: float

    @property
    def relative_cost(self) -> float:
        """Cost in units of what it costs the other layers: 1 usual, 0 idle, below 0 harmful."""
        return self.cost.mean / self.usual if self.usual > 0 else 1.0

    @property
    def surpasses(self) -> bool:
        """Whether the interval that is shown says so; the decision takes the p-value too."""
        return self.gap.low > self.gap_threshold

    @property
    def costs_less(self) -> bool:
        """Whether the whole interval of the cost lies below the margin."""
        return self.cost.high < self.margin


def group_of(score: Score) -> tuple[object, ...]:
    """References that are peers across layers: of one kind, length, part, scheme."""
    r = score.reference
    return (r.kind, r.target - r.layer, r.sublayer, r.scheme, r.group_size)


def is_usable(score: Score) -> bool:
    """Whether every loss of the reference is finite."""
    return bool(np.isfinite([*score.nll_eval, *score.nll_select, *score.kl_eval]).all())


def in_class(run: Run, score: Score) -> bool:
    """Whether the reference may decide on a flag: in the scheme asked for, and in no more bits than the layer has."""
    r = score.reference
    if r.kind not in STATE_KINDS or (r.kind == "identity" and r.target > r.layer):
        return False
    if r.scheme is not None and r.scheme != run.scheme:
        return False  # the ladder serves effective_bits only
    return r.bits <= own_bits(run, r.layer) + _SAME_BITS


def is_lighter(run: Run, score: Score) -> bool:
    """Whether a match by the reference means something: fewer bits than the layer's, or fitted from fresh weights.

    Free weights (`fp`) that start from the trained ones are the trained ones, whatever precision they are stored in.
    """
    r = score.reference
    fewer = r.bits < own_bits(run, r.layer) - _SAME_BITS and r.scheme != "fp"
    return fewer or score.fit.start == "fresh"


def own_bits(run: Run, layer: int) -> float:
    """Bits per weight that the layer itself has."""
    return run.layer_bits[layer - 1] if run.layer_bits else 16.0


def fair_share(run: Run) -> float:
    """A layer's even part of what the network gains over token frequencies, in nats per token."""
    return max(0.0, run.unigram_ce - float(np.mean(run.nll_eval))) / run.num_layers


def gap_threshold(policy: Policy, mismatch: float, floor: float | None = None) -> float:
    """What a gap must exceed to count as surpassing. floor: nats, unless it is the policy's for what was fitted.

    On foreign text a sound layer is surpassed, too: any blunter network is less sure of itself, and so less wrong
    (measured on Shakespeare, 2.9 nats foreign to the sound 5-layer model: ternary references gain up to 0.09 nats).
    """
    ramp = (mismatch - policy.own_gap) / max(policy.foreign_gap - policy.own_gap, 1e-12)
    least = policy.surpassed_floor if floor is None else floor
    return max(least, policy.foreign_share * mismatch * min(1.0, max(0.0, ramp)))


def gather(run: Run, policy: Policy, foreign: bool, mismatch: float) -> list[Evidence]:
    """The evidence of every usable reference to the model's states, with margins from its peers at other layers."""
    usable = [s for s in run.scores if is_usable(s) and s.reference.kind in STATE_KINDS]
    costs = {s.reference.key: _costs(run, s, foreign) for s in usable}
    groups: dict[tuple[object, ...], list[tuple[int, float]]] = {}
    for score in usable:
        mean = float(np.mean(costs[score.reference.key]))
        groups.setdefault(group_of(score), []).append((score.reference.layer, mean))
    threshold = gap_threshold(policy, mismatch)
    found = []
    for score in usable:
        peers = [mean for layer, mean in groups[group_of(score)] if layer != score.reference.layer]
        found.append(_weigh(run, score, costs[score.reference.key], peers, policy, threshold))
    return found


def gather_rollbacks(run: Run, policy: Policy, foreign: bool, mismatch: float) -> list[Evidence]:
    """The evidence of every usable rollback: its gap alone. It has the layer's own bits, so that no cost is a match.

    While the step size is large the last few hundred steps are noise to every block: undone in any one of them the loss
    falls (measured at a constant rate: by .012 to .021 nats in 5 of 6 layers). Such gains say nothing of one layer.
    """
    scores = [s for s in run.scores if is_usable(s) and s.reference.kind == "rollback"]
    gains = {s.reference: float(np.mean(run.nll_eval) - np.mean(s.nll_eval)) for s in scores}
    least = gap_threshold(policy, mismatch, policy.rollback_floor)
    found = []
    for score in scores:
        peers = [
            gain
            for r, gain in gains.items()
            if r.origin_id == score.reference.origin_id and r.layer != score.reference.layer
        ]
        usual = float(np.median(peers)) if len(peers) > 1 else 0.0
        threshold = max(least, policy.rollback_factor * usual)
        found.append(_weigh(run, score, _costs(run, score, foreign), (), policy, threshold))
    return found


def _costs(run: Run, score: Score, foreign: bool) -> np.ndarray:
    return np.asarray(score.kl_eval) if foreign else np.subtract(score.nll_eval, score.beside(run.nll_eval))


def _weigh(
    run: Run, score: Score, cost: np.ndarray, peers: Sequence[float], policy: Policy, threshold: float
) -> Evidence:
    reference = score.reference
    # The lower median, and of no fewer than two: layer 1 costs many times what any other does.
    usual = max(0.0, median_low(peers)) if len(peers) > 1 else 0.0
    is_fitted = reference.kind != "identity"
    least = 0.0 if is_fitted else policy.least_share * fair_share(run)
    from_peers = len(peers) > 1 and usual >= least
    usual = max(usual, least)
    vacuous = is_fitted and from_peers and usual < policy.least_usual
    if policy.matched_margin is not None:
        margin = policy.matched_margin
    elif vacuous:
        margin = 0.0
    elif reference.sublayer is not None:
        margin = policy.sublayer_share * usual
    else:
        margin = (policy.identity_share if reference.kind == "identity" else policy.fitted_share) * usual
    gap = np.subtract(score.beside(run.nll_eval), score.nll_eval)
    # A scheme of the ladder has none: it serves effective_bits, and is never chosen by `select`.
    cost_select = (
        float(np.subtract(score.nll_select, run.nll_select).mean()) if score.nll_select else math.inf
    )
    return Evidence(
        score=score,
        cost=paired_interval(cost.tolist(), policy.confidence),
        gap=paired_interval(gap.tolist(), policy.confidence),
        cost_select=cost_select,
        gap_select=-cost_select,
        divergence=float(np.mean(score.kl_eval)),
        margin=margin,
        usual=usual,
        from_peers=from_peers,
        vacuous=vacuous and policy.matched_margin is None,
        gap_threshold=threshold,
        p_surpassed=p_greater(gap.tolist(), threshold),
        p_matched=p_less(cost.tolist(), margin),
    )


@dataclass(frozen=True)
class Excess:
    """How much more a layer gains by being trained on than the other layers do in the median, paired by sequence."""

    score: Score
    gap: Interval  # what it gains itself: to be better than it was is the proof, to gain more only the blame
    interval: Interval
    threshold: float
    usual: float  # the others' median gain
    p_value: float

    @property
    def stands_out(self) -> bool:
        """Whether both intervals that are shown say so; the decision takes the p-value too."""
        return self.gap.low > 0.0 and self.interval.low > self.threshold


def challenge_excess(run: Run, policy: Policy) -> dict[int, Excess]:
    """The excess of every layer's challenge; empty with fewer than three of them, which have no median to speak of."""
    scores = [s for s in run.scores if s.reference.kind == "challenge" and is_usable(s)]
    gains = {s.reference.layer: np.subtract(run.nll_eval, s.nll_eval) for s in scores}
    if len(gains) < 3:
        return {}
    drops = {
        s.reference.layer: float(np.mean(s.nll_eval) - np.mean(run.nll_eval))
        for s in run.scores
        if s.reference == Reference("identity", s.reference.layer, s.reference.layer) and is_usable(s)
    }
    found = {}
    for score in scores:
        layer = score.reference.layer
        others = np.median([g for n, g in gains.items() if n != layer], axis=0)  # (n_seq,)
        usual = float(np.median([g.mean() for n, g in gains.items() if n != layer]))
        excess = gains[layer] - others  # (n_seq,)
        threshold = max(
            policy.challenge_floor,
            policy.challenge_share * max(usual, 0.0),
            policy.challenge_worth * drops.get(layer, 0.0),
        )
        found[layer] = Excess(
            score,
            paired_interval(gains[layer].tolist(), policy.confidence),
            paired_interval(excess.tolist(), policy.confidence),
            threshold,
            usual,
            max(p_greater(excess.tolist(), threshold), p_greater(gains[layer].tolist())),
        )
    return found
