"""The rules, from the evidence to one verdict a layer.

The best reference of a layer is chosen on `select` and read on `eval`; the decisions over all layers are corrected
together (Holm). What each verdict means, and why these rules, stands in the README under "What the verdicts mean".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from peelcli.records import AuditResult, LayerVerdict, Run
from peelcli.statistics import holm
from peelcli.verdict import words
from peelcli.verdict.evidence import (
    Evidence,
    Excess,
    challenge_excess,
    fair_share,
    gather,
    gather_rollbacks,
    in_class,
    is_lighter,
    is_usable,
    own_bits,
)
from peelcli.verdict.network import data_fit, is_untrained, judge_network, losses_are_finite, mismatch
from peelcli.verdict.policy import Policy

_LIMIT = 100.0  # of the score of a layer that is not broken: peers that cost nothing make ratios of any size


def judge(run: Run, policy: Policy | None = None) -> AuditResult:
    """One verdict for every audited layer, one for the network, and which of them the policy flags."""
    policy = policy or Policy()
    network = judge_network(run, policy)
    layers = _judge_layers(run, policy)
    flagged = tuple(v.layer for v in layers if v.verdict in policy.fail_on)
    network_flagged = any(f in policy.fail_on for f in (*network.flags, network.zone))
    return AuditResult(run, network, layers, flagged, network_flagged)


def _judge_layers(run: Run, policy: Policy) -> tuple[LayerVerdict, ...]:
    broken = {
        f.layer: f for f in reversed(run.findings) if f.kind in ("non-finite", "duplicate-layer") and f.layer
    }
    if any(f.kind == "non-finite" for f in run.findings):
        return tuple(words.broken(n, broken[n]) if n in broken else words.not_measured(n) for n in run.layers)
    verdicts = _measured(run, policy)
    return tuple(words.with_duplicate(v, broken[v.layer]) if v.layer in broken else v for v in verdicts)


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
    return _Rules(run, policy, evidence, rollbacks, foreign).verdicts()


class _Rules:
    """The rules in the order they take effect, over the evidence of one run."""

    def __init__(
        self,
        run: Run,
        policy: Policy,
        evidence: Sequence[Evidence],
        rollbacks: Sequence[Evidence],
        foreign: bool,
    ) -> None:
        self.run, self.policy, self.foreign = run, policy, foreign
        self.by_layer = {
            n: [e for e in evidence if e.score.reference.layer == e.score.reference.target == n]
            for n in run.layers
        }
        self.deciding = {n: [e for e in es if in_class(run, e.score)] for n, es in self.by_layer.items()}
        self.lighter = {n: [e for e in es if is_lighter(run, e.score)] for n, es in self.deciding.items()}
        # They may surpass, and have no say in anything else.
        self.rollbacks = {n: [e for e in rollbacks if e.score.reference.layer == n] for n in run.layers}
        self.spans = [e for e in evidence if e.score.reference.kind == "span" and in_class(run, e.score)]
        self.drops = {
            n: e
            for n, es in self.by_layer.items()
            for e in es
            if e.score.reference.kind == "identity" and e.score.reference.sublayer is None
        }
        self.excess = {n: x for n, x in challenge_excess(run, policy).items() if n in run.layers}

    def verdicts(self) -> list[LayerVerdict]:
        """One verdict a layer, in order."""
        if is_untrained(self.run, self.policy):
            best = {n: _best_on_select(self.deciding[n]) for n in self.run.layers}
            return [words.untrained(n, best[n], self._facts(n)) for n in self.run.layers]
        proven = self._proven()
        older = {e.score.reference.layer: e for e in proven if e.score.reference.kind == "rollback"}
        surpassed = self._surpassed(proven)
        matched = self._matched(set(surpassed))
        challenged = self._challenged(set(surpassed) | set(matched))
        spanned = self._spanned(set(surpassed) | set(matched) | set(challenged))
        out = []
        for layer in self.run.layers:
            facts = self._facts(layer, surpassed.get(layer))
            if layer in surpassed:
                verdict = words.surpassed(layer, surpassed[layer], facts)
                out.append(words.with_rollback(verdict, older.get(layer)))
            elif layer in challenged:
                out.append(words.challenged(layer, challenged[layer], facts))
            elif layer in matched:
                out.append(words.matched(layer, matched[layer], facts))
            elif layer in spanned:
                out.append(words.matched(layer, spanned[layer], facts))
            else:
                out.append(self._unflagged(layer, facts))
        return out

    # -- surpassed ------------------------------------------------------------------------------------------------

    def _proven(self) -> list[Evidence]:
        """What surpasses: up to two of a layer, for the luck of a drop on `select` must not hide a rollback."""
        tested = [
            e
            for n in self.run.layers
            for e in (_best_on_select(self.deciding[n]), _best_on_select(self.rollbacks[n]))
            if e is not None
        ]
        rejected = self._holm({i: e.p_surpassed for i, e in enumerate(tested)})
        return [e for i, e in enumerate(tested) if rejected[i] and e.surpasses]

    def _surpassed(self, proven: Sequence[Evidence]) -> dict[int, Evidence]:
        found = {e.score.reference.layer: e for e in sorted(proven, key=lambda e: e.gap_select)}
        # A block that surpasses by less than its part does so thanks to that part.
        return {
            n: next((o for o in self._wholes(n, e) if o.surpasses and o.gap.mean >= e.gap.low), e)
            for n, e in found.items()
        }

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
            and is_lighter(self.run, e.score)
            and e.divergence < self.policy.divergence_factor * e.margin
        )

    def _matched(self, taken: set[int]) -> dict[int, Evidence]:
        best: dict[int, Evidence] = {}
        tried: dict[int, int] = {}
        for layer in self.run.layers:
            fair = [e for e in self.deciding[layer] if self._matches(e)]
            if layer not in taken and fair:
                best[layer] = min(fair, key=lambda e: (self._select_cost(e) / e.margin, *_cheapest(e)))
                # The divergence is known on `eval` alone: what is chosen by it pays for every candidate.
                tried[layer] = len(fair) if self.foreign else 1
        p_values = {n: min(1.0, tried[n] * best[n].p_matched) if n in best else 1.0 for n in self.run.layers}
        rejected = self._holm(p_values)
        return {
            n: next((o for o in self._wholes(n, e) if self._matches(o) and o.costs_less), e)
            for n, e in best.items()
            if rejected[n] and e.costs_less
        }

    def _select_cost(self, e: Evidence) -> float:
        return e.divergence if self.foreign else e.cost_select

    def _spanned(self, taken: set[int]) -> dict[int, Evidence]:
        """A span that matches blames, of its layers, the cheapest to drop; none where one is flagged already."""
        rejected = self._holm({i: e.p_matched if self._matches(e) else 1.0 for i, e in enumerate(self.spans)})
        fair = [e for i, e in enumerate(self.spans) if rejected[i] and e.costs_less]
        found: dict[int, Evidence] = {}
        explained = set(taken)
        for e in sorted(fair, key=lambda e: (e.cost.mean / e.margin, *_cheapest(e))):
            inside = set(range(e.score.reference.layer, e.score.reference.target + 1))
            # One fault explains spans that overlap; a layer that was not audited may hold it: then none is blamed.
            if inside <= set(self.by_layer) and not inside & explained:
                explained |= inside
                found[
                    min(
                        sorted(inside), key=lambda n: self.drops[n].cost.mean if n in self.drops else math.inf
                    )
                ] = e
        return found

    # -- challenge --------------------------------------------------------------------------------------------------

    def _challenged(self, taken: set[int]) -> dict[int, Excess]:
        """The layer that gains most of all by being trained on, where that is far more than the others gain.

        A fault's neighbours can repair part of it and rise with it: so the peak alone is blamed, and nothing where
        another layer's fault is known already.
        """
        if self.foreign or taken or not self.excess:
            return {}
        rejected = self._holm({n: x.p_value for n, x in self.excess.items()})
        peak = max(self.excess, key=lambda n: self.excess[n].interval.mean)
        return {peak: self.excess[peak]} if rejected[peak] and self.excess[peak].stands_out else {}

    # -- neither ------------------------------------------------------------------------------------------------------

    def _unflagged(self, layer: int, facts: words.Facts) -> LayerVerdict:
        """Effective only where every reference costs clearly more, and none might have cost less with more steps."""
        evidence = [e for e in self.lighter[layer] if not e.vacuous]
        if not evidence:
            fitted = [
                s for s in self.run.scores if s.reference.layer == layer and s.reference.kind != "rollback"
            ]
            diverged = sum(not is_usable(s) for s in fitted)
            return words.unmeasured(layer, diverged, facts)
        factor = self.policy.unsettled_factor
        straddling = [e for e in evidence if e.cost.low <= e.margin]
        unsettled = [e for e in evidence if not e.score.fit.converged and e.cost.mean < factor * e.margin]
        closest = min(straddling or unsettled or evidence, key=lambda e: (_distance(e), *_cheapest(e)))
        if straddling:
            return words.straddles(layer, closest, facts)
        if unsettled:
            return words.unsettled(layer, closest, facts)
        return words.effective(layer, closest, facts)

    # -- facts ------------------------------------------------------------------------------------------------------

    def _holm(self, p_values: Mapping[int, float]) -> dict[int, bool]:
        alpha = 1.0 - self.policy.confidence
        return dict(zip(p_values, holm(list(p_values.values()), alpha), strict=True)) if p_values else {}

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
            relative.append(excess.interval.mean / excess.threshold)
        if surpassing and surpassing.score.reference.kind == "rollback":
            # On the scale of the others, where 1 is an idle layer, and more a layer that does harm.
            relative.append(1.0 + surpassing.gap.mean / max(self._worth(layer), 1e-12))
        return words.Facts(
            own_bits=own,
            effective_bits=self._effective_bits(layer, blocks),
            fvu=direct[0].score.fit.fvu_eval if direct else None,
            drop_cost=self._drop_cost(layer),
            score=float(np.clip(max(relative), -_LIMIT, _LIMIT)) if relative else None,
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


def _best_on_select(evidence: Sequence[Evidence]) -> Evidence | None:
    """The reference that on `select` is furthest above what it must gain: the only one that is tested on `eval`."""
    return min(evidence, key=lambda e: (e.gap_threshold - e.gap_select, *_cheapest(e)), default=None)


def _cheapest(e: Evidence) -> tuple[float, str]:
    """What decides a tie: an idle part makes several references exactly alike."""
    return e.score.reference.bits, e.score.reference.key


def _distance(e: Evidence) -> float:
    """How far the cost of a reference lies above a match, in units of what it usually costs."""
    return (e.cost.mean - e.margin) / max(e.usual, 1e-12)
