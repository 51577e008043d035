"""The rules, from the evidence to one verdict a layer.

The best reference of a layer is chosen on `select` and read on `eval`; the decisions over all layers are corrected
together (Holm). What each verdict means, and why these rules, stands in the README under "What the verdicts mean".
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from peelcli.records import AuditResult, LayerVerdict, Run, Score
from peelcli.verdict import attributed, words
from peelcli.verdict.damaged_network import judge_damaged
from peelcli.verdict.distance_from_init import untouched
from peelcli.verdict.downstream import Behind, in_wrong_order, is_downstream, part_challenges, part_rescales
from peelcli.verdict.end_to_end_gains import (
    Gain,
    best_rescale,
    challenge_excess,
    most_rescaled,
    most_trained,
    peak_of,
    rescale_excess,
    standing_out,
)
from peelcli.verdict.evidence import (
    Evidence,
    cheapest,
    distance,
    fair_share,
    gather,
    gather_exchanges,
    gather_rollbacks,
    in_class,
    is_lighter,
    is_usable,
    own_bits,
)
from peelcli.verdict.health import data_fit, is_damaged, is_untrained, losses_are_finite, mismatch
from peelcli.verdict.localize import narrowed
from peelcli.verdict.network import judge_network
from peelcli.verdict.policy import TINY, Policy
from peelcli.verdict.screening import left_open, screened_under
from peelcli.verdict.statistics import holm_of


def judge(run: Run, policy: Policy | None = None) -> AuditResult:
    """One verdict for every audited layer, one for the network, and which of them the policy flags.

    policy: by default the one that the run's fit was screened under. Under another, no verdict rests on a reference
    that was measured on a part of `eval` where this policy would have measured it on all of it.
    """
    policy = policy or screened_under(run)
    network = judge_network(run, policy)
    found = _judge_layers(run, policy)
    copies = {f.layer: f for f in reversed(run.findings) if f.kind == "duplicate-layer" and f.layer}
    layers = tuple(words.with_duplicate(v, copies[v.layer]) if v.layer in copies else v for v in found)
    # Where the policy lets copies pass, what was measured of a copy still flags.
    flagged = tuple(
        v.layer for v, m in zip(layers, found, strict=True) if {v.verdict, m.verdict} & set(policy.fail_on)
    )
    network_flagged = any(f in policy.fail_on for f in (*network.flags, network.zone))
    return AuditResult(run, network, layers, flagged, network_flagged)


def _judge_layers(run: Run, policy: Policy) -> list[LayerVerdict]:
    broken = {f.layer: f for f in reversed(run.findings) if f.is_non_finite and f.layer}
    if any(f.is_non_finite for f in run.findings):
        return [words.broken(n, broken[n]) if n in broken else words.not_measured(n) for n in run.layers]
    return _measured(run, policy)


def _measured(run: Run, policy: Policy) -> list[LayerVerdict]:
    """What the losses say of every layer of a checkpoint whose files are sound."""
    if len(run.nll_eval) < policy.min_sequences:
        return [words.too_few(n, len(run.nll_eval), policy.min_sequences) for n in run.layers]
    if not losses_are_finite(run):
        return [words.no_loss(n) for n in run.layers]
    foreign = data_fit(run.nll_eval, run.entropy_eval, policy.foreign_gap) == "foreign"
    excess = mismatch(run.nll_eval, run.entropy_eval)
    evidence = gather(run, policy, foreign, excess)
    rollbacks = gather_rollbacks(run, policy, foreign, excess)
    exchanges = gather_exchanges(run, policy, foreign, excess)
    return _Rules(run, policy, evidence, rollbacks, exchanges, foreign).verdicts()


class _Rules:
    """The rules in the order they take effect, over the evidence of one run."""

    def __init__(
        self,
        run: Run,
        policy: Policy,
        evidence: Sequence[Evidence],
        rollbacks: Sequence[Evidence],
        exchanges: Sequence[Evidence],
        foreign: bool,
    ) -> None:
        self.run, self.policy, self.foreign = run, policy, foreign
        self.alpha = 1.0 - policy.confidence
        self.open = left_open(run, policy)
        self.by_layer = {
            n: [e for e in evidence if e.score.reference.layer == e.score.reference.target == n]
            for n in run.layers
        }
        self.deciding = {n: [e for e in es if in_class(run, e.score)] for n, es in self.by_layer.items()}
        self.lighter = {n: [e for e in es if is_lighter(run, e.score)] for n, es in self.deciding.items()}
        # They may surpass, and have no say in anything else.
        self.rollbacks = {n: [e for e in rollbacks if e.score.reference.layer == n] for n in run.layers}
        self.exchanges = [e for e in exchanges if not self._is_open(e)]
        self.spans = [e for e in evidence if e.score.reference.kind == "span" and in_class(run, e.score)]
        self.drops = {
            n: e
            for n, es in self.by_layer.items()
            for e in es
            if e.score.reference.kind == "identity" and e.score.reference.sublayer is None
        }
        self.excess = {n: x for n, x in challenge_excess(run, policy).items() if n in run.layers}
        rescales = {} if foreign else rescale_excess(run, policy)
        self.rescales = {part: x for part, x in rescales.items() if not self._is_open(x)}

    def verdicts(self) -> list[LayerVerdict]:
        """One verdict a layer, in order."""
        if is_untrained(self.run, self.policy):
            best = {n: _best_on_select(self.deciding[n]) for n in self.run.layers}
            return [words.untrained(n, best[n], self._facts(n)) for n in self.run.layers]
        if is_damaged(self.run, self.policy):
            return judge_damaged(self.run, self.policy, self.excess, self._facts)
        return [self._finished(v) for v in self._found()]

    def _found(self) -> list[LayerVerdict]:
        """What was found in each layer. A finding loses its flag to another layer's alone, which the reason names."""
        proven = self._proven()
        older = {e.score.reference.layer: e for e in proven if e.score.reference.kind == "rollback"}
        every, behind_order = self._surpassed(proven)
        every_match = self._matched(set(every))
        excess = {} if self.foreign else self.excess
        standing, peak = standing_out(excess, self.policy), peak_of(excess)
        blamed = most_trained(excess, standing, {n: e.gap.mean for n, e in every.items()}, self.policy)
        behind = is_downstream(every, every_match, blamed, excess, self._worth, self.policy)
        surpassed = {n: e for n, e in every.items() if n not in behind}
        matched = {n: e for n, e in every_match.items() if n not in behind}
        challenged, behind_peak = part_challenges(standing, blamed, surpassed, every_match, peak, self.policy)
        rescaled, behind_rescale = part_rescales(
            most_rescaled(self.rescales, self.alpha), {**surpassed, **challenged}, self.policy
        )
        flagged = {**matched, **rescaled, **challenged, **surpassed}
        spanned, behind_span = self._spanned(
            {n: n for n in flagged} | {n: b.hurt for n, b in behind.items() if n not in flagged}
        )
        behind_order = {
            n: replace(b, hurt=behind[b.hurt].hurt) if b.hurt in behind else b
            for n, b in behind_order.items()
        }
        behind = {**behind_span, **behind_rescale, **behind_peak, **behind_order, **behind}
        out = []
        for layer in self.run.layers:
            facts = self._facts(layer, every.get(layer))
            if layer in surpassed:
                verdict = words.surpassed(layer, surpassed[layer], facts)
                verdict = words.with_rescale(verdict, best_rescale(self.rescales, layer))
                out.append(words.with_rollback(verdict, older.get(layer)))
            elif layer in challenged:
                verdict = words.challenged(layer, challenged[layer], facts)
                out.append(attributed.with_match(verdict, every_match.get(layer)))
            elif layer in rescaled:
                verdict = words.rescaled(layer, rescaled[layer], facts)
                out.append(attributed.with_match(verdict, every_match.get(layer)))
            elif layer in matched or layer in spanned:
                verdict = words.matched(layer, matched.get(layer) or spanned[layer], facts)
                out.append(attributed.with_behind(verdict, behind.get(layer)))
            elif layer in behind:
                out.append(attributed.behind_another(layer, behind[layer], facts))
            else:
                out.append(self._unflagged(layer, facts, self._left_open(layer, {*flagged, *spanned})))
        return out

    def _is_open(self, finding: Evidence | Gain) -> bool:
        return finding.score.reference.key in self.open

    def _left_open(self, layer: int, flagged: Collection[int]) -> Score | None:
        """A reference that may yet flag the layer, by what it does on all of `eval`."""
        for score in self.open.values():
            inside = range(score.reference.layer, score.reference.target + 1)
            if layer in inside and not set(inside) & set(flagged):
                return score
        return None

    def _finished(self, verdict: LayerVerdict) -> LayerVerdict:
        found = self.by_layer[verdict.layer]
        drops = [e for e in found if e.score.reference.kind == "identity" and e.score.reference.sublayer]
        verdict = narrowed(_in_rank(verdict, self.policy), self.run, drops, self.rescales, self.policy)
        return words.with_untouched(verdict, untouched(self.run, verdict.layer))

    # -- surpassed ------------------------------------------------------------------------------------------------

    def _proven(self) -> list[Evidence]:
        """What surpasses: up to two of a layer, for the luck of a drop on `select` must not hide a rollback."""
        tested = [
            e
            for n in self.run.layers
            for e in (_best_on_select(self.deciding[n]), _best_on_select(self.rollbacks[n]))
            if e is not None
        ]
        tested += self.exchanges
        rejected = holm_of({i: e.p_surpassed for i, e in enumerate(tested)}, self.alpha)
        return [e for i, e in enumerate(tested) if rejected[i] and e.surpasses]

    def _surpassed(self, proven: Sequence[Evidence]) -> tuple[dict[int, Evidence], dict[int, Behind]]:
        """What surpasses each layer, and the layers of exchanges that something stronger explains."""
        found = {
            e.score.reference.layer: e
            for e in sorted(proven, key=lambda e: e.gap_select)
            if e.score.reference.kind != "exchange"
        }
        exchanges, behind = in_wrong_order(proven, found)
        # A block that surpasses by less than its part does so thanks to that part.
        found = {
            n: next((o for o in self._wholes(n, e) if o.surpasses and o.gap.mean > e.gap.mean), e)
            for n, e in found.items()
        } | exchanges
        return found, {n: b for n, b in behind.items() if n not in found}

    def _wholes(self, layer: int, part: Evidence) -> list[Evidence]:
        """References of the same kind for the whole block: where one says the same, the block is to blame."""
        if part.score.reference.sublayer is None:
            return []
        kind = part.score.reference.kind
        return [
            e
            for e in self.deciding[layer]
            if e.score.reference.sublayer is None and e.score.reference.kind == kind
        ]

    # -- matched --------------------------------------------------------------------------------------------------

    def _matches(self, e: Evidence) -> bool:
        """A match leaves the predictions alone, too: equal losses by chance, of other predictions, are none."""
        return (
            e.margin > 0
            and not self._is_open(e)
            and is_lighter(self.run, e.score)
            and e.divergence < self.policy.divergence_factor * e.widest
        )

    def _matched(self, taken: set[int]) -> dict[int, Evidence]:
        best: dict[int, Evidence] = {}
        tried: dict[int, int] = {}
        for layer in self.run.layers:
            fair = [e for e in self.deciding[layer] if self._matches(e)]
            if layer not in taken and fair:
                best[layer] = min(fair, key=lambda e: (self._chance_on_select(e), *cheapest(e)))
                # The divergence is known on `eval` alone: what is chosen by it pays for every candidate.
                tried[layer] = len(fair) if self.foreign else 1
        p_values = {n: min(1.0, tried[n] * best[n].p_matched) if n in best else 1.0 for n in self.run.layers}
        rejected = holm_of(p_values, self.alpha)
        return {
            n: next((o for o in self._wholes(n, e) if self._matches(o) and o.costs_less), e)
            for n, e in best.items()
            if rejected[n] and e.costs_less
        }

    def _chance_on_select(self, e: Evidence) -> float:
        """What orders the candidates: a fit costs little next to a tiny margin, and less surely than a drop does."""
        return e.divergence / e.margin if self.foreign else e.p_matched_select

    def _spanned(self, causes: Mapping[int, int]) -> tuple[dict[int, Evidence], dict[int, Behind]]:
        """A span that matches blames the layer in it that is cheapest to drop, unless another's fault explains it.

        causes: the layers that something was found in already, and of each the layer whose fault that is.
        """
        rejected = holm_of(
            {i: e.p_matched if self._matches(e) else 1.0 for i, e in enumerate(self.spans)}, self.alpha
        )
        fair = [e for i, e in enumerate(self.spans) if rejected[i] and e.costs_less]
        found: dict[int, Evidence] = {}
        behind: dict[int, Behind] = {}
        explained = dict(causes)
        for e in sorted(fair, key=lambda e: (e.cost.mean / e.margin, *cheapest(e))):
            inside = range(e.score.reference.layer, e.score.reference.target + 1)
            # A layer that was not audited may hold the fault: then none is blamed.
            if not set(inside) <= set(self.by_layer):
                continue
            idlest = min(inside, key=lambda n: self.drops[n].cost.mean if n in self.drops else math.inf)
            # One fault explains spans that overlap.
            cause = next((explained[n] for n in inside if n in explained), None)
            if cause is None:
                explained |= dict.fromkeys(inside, idlest)
                found[idlest] = e
            elif idlest not in explained:
                behind.setdefault(idlest, Behind(cause, e))
        return found, behind

    # -- neither ------------------------------------------------------------------------------------------------------

    def _unflagged(self, layer: int, facts: words.Facts, left: Score | None) -> LayerVerdict:
        """Effective only where every reference costs clearly more, and none might have cost less with more steps.

        left: one that was measured on too little to say so.
        """
        if left is not None:
            return words.measured_on_part(layer, left, self.run, self.policy, facts)
        evidence = [e for e in self.lighter[layer] if not e.vacuous]
        if not evidence:
            fitted = [
                s
                for s in self.run.scores
                if s.reference.layer == layer and s.reference.kind not in ("exchange", "rollback")
            ]
            diverged = sum(not is_usable(s) for s in fitted)
            return words.unmeasured(layer, diverged, facts)
        factor = self.policy.unsettled_factor
        straddling = [e for e in evidence if e.cost.low <= e.margin]
        unsettled = [e for e in evidence if not e.score.fit.converged and e.cost.mean < factor * e.margin]
        closest = min(straddling or unsettled or evidence, key=lambda e: (distance(e), *cheapest(e)))
        if straddling:
            return words.straddles(layer, closest, facts)
        if unsettled:
            return words.unsettled(layer, closest, facts)
        return words.effective(layer, closest, facts)

    # -- facts ------------------------------------------------------------------------------------------------------

    def _drop_cost(self, layer: int) -> float | None:
        return -self.drops[layer].gap.mean if layer in self.drops else None

    def _facts(self, layer: int, surpassing: Evidence | None = None) -> words.Facts:
        evidence = self.by_layer[layer]
        blocks = [e for e in evidence if e.score.reference.sublayer is None]
        own = own_bits(self.run, layer)
        direct = [
            e
            for e in blocks
            if e.score.reference.kind == "direct" and e.score.reference.scheme == self.run.scheme
        ]
        telling = [e for e in self.lighter[layer] if not e.vacuous]
        telling += [e for e in self.deciding[layer] if e.surpasses]
        relative = [1.0 - e.relative_cost for e in telling]
        excess = self.excess.get(layer)
        if excess and not self.foreign:
            relative.append(excess.interval.low / excess.threshold)
        for (n, _), x in self.rescales.items():
            if n == layer:
                least = max(self.policy.rescale_floor, self.policy.rescale_factor * x.usual)
                relative.append(x.gap.low / least)
        if surpassing:
            # On the scale of the others, where 1 is an idle layer, and more a layer that does harm.
            relative.append(1.0 + surpassing.gap.mean / max(self._worth(layer), TINY))
        limit = self.policy.score_limit
        return words.Facts(
            own_bits=own,
            effective_bits=self._effective_bits(layer, blocks),
            fvu=direct[0].score.fit.fvu_eval if direct else None,
            drop_cost=self._drop_cost(layer),
            score=float(np.clip(max(relative), -limit, limit)) if relative else None,
            foreign=self.foreign,
        )

    def _effective_bits(self, layer: int, blocks: Sequence[Evidence]) -> float | None:
        """Bits of the cheapest stand-in for the whole block whose cost is small against what dropping a layer costs."""
        margin = self.policy.effective_share * self._worth(layer)
        limit = self.policy.divergence_factor * margin
        cheap = [e.score.reference.bits for e in blocks if e.cost.high < margin and e.divergence < limit]
        return min(cheap, default=None)

    def _worth(self, layer: int) -> float:
        """What a layer is worth, in nats per token: what dropping another costs, or else an even share."""
        drops = [e.cost.mean for n, e in self.drops.items() if n != layer]
        return median(drops) if len(drops) > 1 else fair_share(self.run)


def _in_rank(verdict: LayerVerdict, policy: Policy) -> LayerVerdict:
    """The layers that something was found in come first, whatever else is measured of the others."""
    if verdict.score is None:
        return verdict
    rank = max if verdict.verdict in ("surpassed", "matched") else min
    return replace(verdict, score=rank(verdict.score, policy.found_score))


def _best_on_select(evidence: Sequence[Evidence]) -> Evidence | None:
    """The reference that on `select` is furthest above what it must gain: the only one that is tested on `eval`."""
    return min(evidence, key=lambda e: (e.gap_threshold - e.gap_select, *cheapest(e)), default=None)
