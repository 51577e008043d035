"""The rules, from the evidence to one verdict a layer.

The best reference of a layer is chosen on `select` and read on `eval`; the decisions over all layers are corrected
together (Holm). What each verdict means, and why these rules, stands in the README under "What the verdicts mean".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peelcli.records import AuditResult, LayerVerdict, Run
from peelcli.statistics import holm
from peelcli.verdict import words
from peelcli.verdict.evidence import (
    Evidence,
    Excess,
    challenge_excess,
    gather,
    in_class,
    is_lighter,
    own_bits,
)
from peelcli.verdict.network import data_fit, is_untrained, judge_network, mismatch
from peelcli.verdict.policy import Policy


def judge(run: Run, policy: Policy | None = None) -> AuditResult:
    """One verdict for every audited layer, one for the network, and which of them the policy flags."""
    policy = policy or Policy()
    network = judge_network(run, policy)
    layers = _judge_layers(run, policy)
    flagged = tuple(v.layer for v in layers if v.verdict in policy.fail_on)
    return AuditResult(run, network, layers, flagged, any(f in policy.fail_on for f in network.flags))


def _judge_layers(run: Run, policy: Policy) -> tuple[LayerVerdict, ...]:
    broken = {
        f.layer: f for f in reversed(run.findings) if f.kind in ("non-finite", "duplicate-layer") and f.layer
    }
    if any(f.kind == "non-finite" for f in run.findings):
        return tuple(words.broken(n, broken[n]) if n in broken else words.not_measured(n) for n in run.layers)
    if len(run.nll_eval) < policy.min_sequences:
        return tuple(words.too_few(n, len(run.nll_eval), policy.min_sequences) for n in run.layers)
    foreign = data_fit(run.nll_eval, run.entropy_eval, policy.foreign_gap) == "foreign"
    evidence = gather(run, policy, foreign, mismatch(run.nll_eval, run.entropy_eval))
    verdicts = _Rules(run, policy, evidence, foreign).verdicts()
    return tuple(words.with_duplicate(v, broken[v.layer]) if v.layer in broken else v for v in verdicts)


class _Rules:
    """The rules in the order they take effect, over the evidence of one run."""

    def __init__(self, run: Run, policy: Policy, evidence: Sequence[Evidence], foreign: bool) -> None:
        self.run, self.policy, self.foreign = run, policy, foreign
        self.by_layer = {
            n: [e for e in evidence if e.score.reference.layer == e.score.reference.target == n]
            for n in run.layers
        }
        self.deciding = {n: [e for e in es if in_class(run, e.score)] for n, es in self.by_layer.items()}
        self.spans = [e for e in evidence if e.score.reference.kind == "span" and in_class(run, e.score)]
        self.excess = {n: x for n, x in challenge_excess(run, policy).items() if n in run.layers}

    def verdicts(self) -> list[LayerVerdict]:
        """One verdict a layer, in order."""
        if is_untrained(self.run, self.policy):
            return [words.untrained(n, self._surpassing(n), self._facts(n)) for n in self.run.layers]
        surpassed = self._surpassed()
        matched = self._matched(set(surpassed))
        challenged = self._challenged(set(surpassed) | set(matched))
        spanned = self._spanned(set(surpassed) | set(matched) | set(challenged))
        out = []
        for layer in self.run.layers:
            facts = self._facts(layer)
            if layer in surpassed:
                out.append(words.surpassed(layer, surpassed[layer], facts))
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

    def _surpassing(self, layer: int) -> Evidence | None:
        """The reference of a layer with the largest gap on `select`: the only one whose gap is tested on `eval`."""
        return max(self.deciding[layer], key=lambda e: e.gap_select, default=None)

    def _surpassed(self) -> dict[int, Evidence]:
        best = {n: e for n in self.run.layers if (e := self._surpassing(n)) is not None}
        rejected = self._holm({n: e.p_surpassed for n, e in best.items()})
        return {n: self._whole_if_whole(n, best[n]) for n in best if rejected[n]}

    def _whole_if_whole(self, layer: int, best: Evidence) -> Evidence:
        """Where dropping or replacing the whole block surpasses or matches too, the block is to blame, not a part."""
        if best.score.reference.sublayer is None:
            return best
        kind, sound = best.score.reference.kind, 1.0 - self.policy.confidence
        for other in self.deciding[layer]:
            r = other.score.reference
            if r.sublayer is None and r.kind == kind and min(other.p_surpassed, other.p_matched) < sound:
                return other
        return best

    # -- matched --------------------------------------------------------------------------------------------------

    def _matches(self, e: Evidence) -> bool:
        """A match leaves the predictions alone, too: equal losses by chance, of other predictions, are none."""
        return e.margin > 0 and e.divergence < self.policy.divergence_factor * e.margin

    def _matched(self, taken: set[int]) -> dict[int, Evidence]:
        best: dict[int, Evidence] = {}
        for layer in self.run.layers:
            fair = [e for e in self.deciding[layer] if is_lighter(self.run, e.score) and self._matches(e)]
            if layer not in taken and fair:
                best[layer] = min(fair, key=lambda e: self._select_cost(e) / e.margin)
        rejected = self._holm({n: e.p_matched for n, e in best.items()})
        return {n: self._whole_if_whole(n, e) for n, e in best.items() if rejected[n]}

    def _select_cost(self, e: Evidence) -> float:
        return e.divergence if self.foreign else e.cost_select

    def _spanned(self, taken: set[int]) -> dict[int, Evidence]:
        """A span that matches blames, of its layers, the cheapest to drop; none where one is flagged already."""
        fair = [
            e
            for e in self.spans
            if self._matches(e)
            and not taken & set(range(e.score.reference.layer, e.score.reference.target + 1))
        ]
        rejected = self._holm({i: e.p_matched for i, e in enumerate(fair)})
        found: dict[int, Evidence] = {}
        for index, e in enumerate(fair):
            inside = [
                n for n in range(e.score.reference.layer, e.score.reference.target + 1) if n in self.by_layer
            ]
            if rejected[index] and inside and not set(inside) & set(found):
                found[min(inside, key=lambda n: self._drop_cost(n) or 0.0)] = e
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
        return {peak: self.excess[peak]} if rejected[peak] else {}

    # -- neither ------------------------------------------------------------------------------------------------------

    def _unflagged(self, layer: int, facts: words.Facts) -> LayerVerdict:
        evidence = self.deciding[layer]
        if not evidence:
            return words.undecided(
                layer, "no reference of this layer could be measured", "see what was skipped", facts
            )
        closest = min(evidence, key=lambda e: (e.cost.mean - e.margin) / max(e.usual, 1e-12))
        unsettled = [
            e
            for e in evidence
            if not e.score.fit.converged and self._matches(e) and e.cost.mean < 3 * e.margin
        ]
        if closest.cost.low <= max(closest.margin, 0.0) and self._matches(closest):
            return words.straddles(layer, closest, facts)
        if unsettled:
            return words.unsettled(layer, unsettled[0], facts)
        return words.effective(layer, closest, facts)

    # -- facts ----------------------------------------------------------------------------------------------------------

    def _holm(self, p_values: Mapping[int, float]) -> dict[int, bool]:
        alpha = 1.0 - self.policy.confidence
        return dict(zip(p_values, holm(list(p_values.values()), alpha), strict=True)) if p_values else {}

    def _drop_cost(self, layer: int) -> float | None:
        for e in self.by_layer[layer]:
            if e.score.reference.kind == "identity" and e.score.reference.sublayer is None:
                return -e.gap.mean
        return None

    def _facts(self, layer: int) -> words.Facts:
        evidence = self.by_layer[layer]
        blocks = [e for e in evidence if e.score.reference.sublayer is None]
        own = own_bits(self.run, layer)
        direct = [
            e
            for e in blocks
            if e.score.reference.kind == "direct" and e.score.reference.scheme == self.run.scheme
        ]
        relative = [1.0 - e.relative_cost for e in self.deciding[layer]]
        excess = self.excess.get(layer)
        if excess and not self.foreign:
            relative.append(excess.interval.mean / excess.threshold)
        return words.Facts(
            own_bits=own,
            effective_bits=self._effective_bits(blocks),
            fvu=direct[0].score.fit.fvu_eval if direct else None,
            drop_cost=self._drop_cost(layer),
            score=float(np.max(relative)) if relative else None,
            foreign=self.foreign,
        )

    def _effective_bits(self, blocks: Sequence[Evidence]) -> float | None:
        """Bits of the cheapest stand-in for the whole block whose cost is small against what dropping a layer costs."""
        worth = next((e.usual for e in blocks if e.score.reference.kind == "identity"), 0.0)
        margin = self.policy.effective_share * worth
        cheap = [e.score.reference.bits for e in blocks if worth > 0 and e.cost.high < margin]
        return min(cheap, default=None)
