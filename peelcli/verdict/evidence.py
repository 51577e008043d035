"""What each reference says about its layer: its gap, and its cost against that of its peers at other layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from peelcli.records import Run, Score
from peelcli.verdict.distance_from_init import untouched_parts, young_parts
from peelcli.verdict.policy import Policy
from peelcli.verdict.statistics import Interval, p_greater, p_less, paired_interval
from peelcli.verdict.weight_norms import relative_size

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
    widest: float  # the margin where the layer's weights speak for it
    usual: float  # what the same reference costs the other layers, or what stands in for that
    from_peers: bool  # whether `usual` is the lower median over the other layers
    vacuous: bool  # a fit that costs next to nothing at any layer: in so many bits a match says nothing
    gap_threshold: float  # what a gap must exceed beyond chance to count as surpassing…
    gap_floor: float  # …and what it must come to, to matter
    p_surpassed: float
    p_matched: float
    p_matched_select: float  # the same on `select`, where it is the loss on foreign text, too

    @property
    def relative_cost(self) -> float:
        """Cost in units of what it costs the other layers: 0 idle, below 0 harmful.

        More where the layer's weights speak against a match, so that what matches has the least.
        """
        if self.usual <= 0:
            return 1.0
        strictness = self.widest / self.margin if self.margin > 0 else 1.0
        return self.cost.mean / self.usual * (strictness if self.cost.mean > 0 else 1.0)

    @property
    def surpasses(self) -> bool:
        """Whether the interval that is shown says so; the decision takes the p-value too."""
        return self.gap.low > self.gap_threshold and self.gap.mean > self.gap_floor

    @property
    def costs_less(self) -> bool:
        """Whether the whole interval of the cost lies below the margin."""
        return self.cost.high < self.margin


def cheapest(e: Evidence) -> tuple[float, str]:
    """What decides a tie: an idle part makes several references exactly alike."""
    return e.score.reference.bits, e.score.reference.key


def distance(e: Evidence) -> float:
    """How far the cost of a reference lies above a match, in units of what it usually costs."""
    return (e.cost.mean - e.margin) / max(e.usual, 1e-12)


def group_of(score: Score) -> tuple[object, ...]:
    """References that are peers across layers: of one kind, length, part, scheme."""
    r = score.reference
    return (r.kind, r.target - r.layer, r.sublayer, *r.grid)


def is_usable(score: Score) -> bool:
    """Whether every loss of the reference is finite."""
    return bool(np.isfinite([*score.nll_eval, *score.nll_select, *score.kl_eval]).all())


def shared_rows(total: int, *scores: Score) -> list[slice]:
    """What picks, of the losses of each, those on the sequences that all were measured on; total: of `eval`."""
    strides = [score.stride(total) for score in scores]
    shared = math.lcm(*strides)
    return [slice(None, None, shared // stride) for stride in strides]


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
    return even_share(run.nll_eval, run.unigram_ce, run.num_layers)


def even_share(nll_eval: Sequence[float], unigram_ce: float, num_layers: int) -> float:
    """The same of losses that are not yet a run."""
    return max(0.0, unigram_ce - float(np.mean(nll_eval))) / num_layers


def foreign_allowance(policy: Policy, mismatch: float) -> float:
    """What a gap must clearly exceed to count as surpassing: nothing on the model's own text.

    On foreign text a sound layer is surpassed, too: any blunter network is less sure of itself, and so less wrong
    (measured on Shakespeare, 2.9 nats foreign to the sound 5-layer model: ternary references gain up to 0.09 nats).
    """
    ramp = (mismatch - policy.own_gap) / max(policy.foreign_gap - policy.own_gap, 1e-12)
    return policy.foreign_share * mismatch * min(1.0, max(0.0, ramp))


def gather(run: Run, policy: Policy, foreign: bool, mismatch: float) -> list[Evidence]:
    """The evidence of every usable reference to the model's states, with margins from its peers at other layers."""
    usable = [s for s in run.scores if is_usable(s) and s.reference.kind in STATE_KINDS]
    costs = {s.reference.key: _costs(run, s, foreign) for s in usable}
    groups: dict[tuple[object, ...], list[tuple[int, float]]] = {}
    for score in usable:
        mean = float(np.mean(costs[score.reference.key]))
        groups.setdefault(group_of(score), []).append((score.reference.layer, mean))
    threshold = foreign_allowance(policy, mismatch)
    parts = {(s.reference.layer, s.reference.sublayer) for s in usable}
    unlike = young_parts(run, policy) | {
        p for p in parts if abs(relative_size(run, *p)) >= policy.unlike_size
    }
    never_trained = untouched_parts(run)
    found = []
    for score in usable:
        peers = [mean for layer, mean in groups[group_of(score)] if layer != score.reference.layer]
        part = (score.reference.layer, score.reference.sublayer)
        is_new = part in never_trained and score.reference.kind == "identity"
        leniency = policy.untouched_factor if is_new else 1.0 if part in unlike else 0.0
        found.append(
            _weigh(run, score, costs[score.reference.key], peers, policy, threshold, leniency=leniency)
        )
    return found


def gather_rollbacks(run: Run, policy: Policy, foreign: bool, mismatch: float) -> list[Evidence]:
    """The evidence of every usable rollback: its gap alone. It has the layer's own bits, so that no cost is a match.

    While the step size is large the last few hundred steps are noise to every block: undone in any one of them the loss
    falls (measured at a constant rate: by .012 to .021 nats in 5 of 6 layers). Such gains say nothing of one layer.
    """
    scores = [s for s in run.scores if is_usable(s) and s.reference.kind == "rollback"]
    gains = {s.reference: float(np.mean(run.nll_eval) - np.mean(s.nll_eval)) for s in scores}
    least = foreign_allowance(policy, mismatch)
    found = []
    for score in scores:
        peers = [
            gain
            for r, gain in gains.items()
            if r.origin_id == score.reference.origin_id and r.layer != score.reference.layer
        ]
        usual = float(np.median(peers)) if len(peers) > 1 else 0.0
        threshold = max(least, policy.rollback_factor * usual)
        costs = _costs(run, score, foreign)
        found.append(_weigh(run, score, costs, (), policy, threshold, policy.rollback_floor))
    return found


def gather_exchanges(run: Run, policy: Policy, foreign: bool, mismatch: float) -> list[Evidence]:
    """The evidence of every pair of neighbours exchanged: its gap alone, for it has the layers' own bits."""
    threshold = foreign_allowance(policy, mismatch)
    return [
        _weigh(run, s, _costs(run, s, foreign), (), policy, threshold)
        for s in run.scores
        if s.reference.kind == "exchange" and is_usable(s)
    ]


def _costs(run: Run, score: Score, foreign: bool) -> np.ndarray:
    return np.asarray(score.kl_eval) if foreign else np.subtract(score.nll_eval, score.beside(run.nll_eval))


def _weigh(
    run: Run,
    score: Score,
    cost: np.ndarray,
    peers: Sequence[float],
    policy: Policy,
    threshold: float,
    floor: float | None = None,
    leniency: float = 0.0,
) -> Evidence:
    """leniency: how many times the policy's shares a match may cost; 0: less, for nothing else speaks for a fault."""
    reference = score.reference
    # The lower median, and of no fewer than two: layer 1 costs many times what any other does.
    peers_usual = usual = max(0.0, median_low(peers)) if len(peers) > 1 else 0.0
    is_fitted = reference.kind != "identity"
    least = 0.0 if is_fitted else policy.least_share * fair_share(run)
    from_peers = len(peers) > 1 and usual >= least
    usual = max(usual, least)
    vacuous = is_fitted and from_peers and usual < policy.least_usual
    if reference.sublayer is not None:
        share = policy.sublayer_share
    else:
        share = policy.fitted_share if is_fitted else policy.identity_share
    widest = 0.0 if vacuous else share * usual * max(leniency, 1.0)
    margin = widest
    if reference.kind != "span" and not leniency:  # a span stands in for several layers
        # Early in training most layers' attention does next to nothing: then less still is no news of one of them.
        is_part = reference.kind == "identity" and reference.sublayer is not None and len(peers) > 1
        margin = min(margin, policy.idle_share * (peers_usual if is_part else usual))
    if policy.matched_margin is not None:
        margin = widest = policy.matched_margin
    gap = np.subtract(score.beside(run.nll_eval), score.nll_eval)
    # A scheme of the ladder has none: it serves effective_bits, and is never chosen by `select`.
    on_select = np.subtract(score.nll_select, run.nll_select) if score.nll_select else np.array([])
    cost_select = float(on_select.mean()) if len(on_select) else math.inf
    return Evidence(
        score=score,
        cost=paired_interval(cost.tolist(), policy.confidence),
        gap=paired_interval(gap.tolist(), policy.confidence),
        cost_select=cost_select,
        gap_select=-cost_select,
        divergence=float(np.mean(score.kl_eval)),
        margin=margin,
        widest=widest,
        usual=usual,
        from_peers=from_peers,
        vacuous=vacuous and policy.matched_margin is None,
        gap_threshold=threshold,
        gap_floor=policy.surpassed_floor if floor is None else floor,
        p_surpassed=p_greater(gap.tolist(), threshold),
        p_matched=p_less(cost.tolist(), margin),
        p_matched_select=p_less(on_select.tolist(), margin) if len(on_select) > 1 else 1.0,
    )
