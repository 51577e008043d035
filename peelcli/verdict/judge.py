"""The rules, from the evidence to one verdict a layer.

The best reference of a layer is chosen on `select` and read on `eval`; the decisions over all layers are corrected
together (Holm). What each verdict means, and why these rules, stands in the README under "What the verdicts mean".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from peelcli.records import AuditResult, LayerVerdict, Run
from peelcli.statistics import holm_of
from peelcli.verdict import words
from peelcli.verdict.behind import behind_another
from peelcli.verdict.blame import narrowed
from peelcli.verdict.damage import is_damaged, judge_damaged
from peelcli.verdict.evidence import (
    Evidence,
    fair_share,
    gather,
    gather_exchanges,
    gather_rollbacks,
    in_class,
    is_lighter,
    is_usable,
    own_bits,
)
from peelcli.verdict.excess import (
    best_rescale,
    challenge_excess,
    most_rescaled,
    most_trained,
    rescale_excess,
)
from peelcli.verdict.network import (
    data_fit,
    is_untrained,
    judge_network,
    losses_are_finite,
    mismatch,
)
from peelcli.verdict.policy import Policy
from peelcli.verdict.travel import untouched

_FOUND = (
    0.9  # the score that parts what is found from what is not: a match costs a tenth of the usual at most
)
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
        self.by_layer = {
            n: [e for e in evidence if e.score.reference.layer == e.score.reference.target == n]
            for n in run.layers
        }
        self.deciding = {n: [e for e in es if in_class(run, e.score)] for n, es in self.by_layer.items()}
        self.lighter = {n: [e for e in es if is_lighter(run, e.score)] for n, es in self.deciding.items()}
        # They may surpass, and have no say in anything else.
        self.rollbacks = {n: [e for e in rollbacks if e.score.reference.layer == n] for n in run.layers}
        self.exchanges = list(exchanges)
        self.spans = [e for e in evidence if e.score.reference.kind == "span" and in_class(run, e.score)]
        self.drops = {
            n: e
            for n, es in self.by_layer.items()
            for e in es
            if e.score.reference.kind == "identity" and e.score.reference.sublayer is None
        }
        self.excess = {n: x for n, x in challenge_excess(run, policy).items() if n in run.layers}
        self.rescales = {} if foreign else rescale_excess(run, policy)

    def verdicts(self) -> list[LayerVerdict]:
        """One verdict a layer, in order."""
        if is_untrained(self.run, self.policy):
            best = {n: _best_on_select(self.deciding[n]) for n in self.run.layers}
            return [words.untrained(n, best[n], self._facts(n)) for n in self.run.layers]
        if is_damaged(self.run, self.policy):
            return judge_damaged(self.run, self.policy, self.excess, self._facts)
        proven = self._proven()
        older = {e.score.reference.layer: e for e in proven if e.score.reference.kind == "rollback"}
        surpassed = self._surpassed(proven)
        matched = self._matched(set(surpassed))
        known = {n: e.gap.mean for n, e in surpassed.items()}
        challenged = {} if self.foreign or matched else most_trained(self.excess, known, self.policy)
        found = surpassed or matched or challenged
        rescaled = {} if found else most_rescaled(self.rescales, self.alpha)
        excess = {} if self.foreign else self.excess
        behind = behind_another(surpassed, matched, challenged, excess, self._worth, self.policy)
        spanned = self._spanned(set(surpassed) | set(matched) | set(challenged) | set(rescaled))
        out = []
        for layer in self.run.layers:
            facts = self._facts(layer, surpassed.get(layer))
            if layer in behind:
                out.append(words.behind_another(layer, behind[layer], facts))
            elif layer in surpassed:
                verdict = words.surpassed(layer, surpassed[layer], facts)
                verdict = words.with_rescale(verdict, best_rescale(self.rescales, layer))
                out.append(words.with_rollback(verdict, older.get(layer)))
            elif layer in challenged:
                out.append(words.challenged(layer, challenged[layer], facts))
            elif layer in rescaled:
                out.append(words.rescaled(layer, rescaled[layer], facts))
            elif layer in matched:
                out.append(words.matched(layer, matched[layer], facts))
            elif layer in spanned:
                out.append(words.matched(layer, spanned[layer], facts))
            else:
                out.append(self._unflagged(layer, facts))
        return [self._finished(v) for v in out]

    def _finished(self, verdict: LayerVerdict) -> LayerVerdict:
        found = self.by_layer[verdict.layer]
        drops = [e for e in found if e.score.reference.kind == "identity" and e.score.reference.sublayer]
        verdict = narrowed(_in_rank(verdict), self.run, drops, self.rescales, self.policy)
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

    def _surpassed(self, proven: Sequence[Evidence]) -> dict[int, Evidence]:
        found = {
            e.score.reference.layer: e
            for e in sorted(proven, key=lambda e: e.gap_select)
            if e.score.reference.kind != "exchange"
        }
        # A block that surpasses by less than its part does so thanks to that part.
        return {
            n: next((o for o in self._wholes(n, e) if o.surpasses and o.gap.mean > e.gap.mean), e)
            for n, e in found.items()
        } | _in_wrong_order(proven, found)

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
            and e.divergence < self.policy.divergence_factor * e.widest
        )

    def _matched(self, taken: set[int]) -> dict[int, Evidence]:
        best: dict[int, Evidence] = {}
        tried: dict[int, int] = {}
        for layer in self.run.layers:
            fair = [e for e in self.deciding[layer] if self._matches(e)]
            if layer not in taken and fair:
                best[layer] = min(fair, key=lambda e: (self._chance_on_select(e), *_cheapest(e)))
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

    def _spanned(self, taken: set[int]) -> dict[int, Evidence]:
        """A span that matches blames, of its layers, the cheapest to drop; none where one is flagged already."""
        rejected = holm_of(
            {i: e.p_matched if self._matches(e) else 1.0 for i, e in enumerate(self.spans)}, self.alpha
        )
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

    # -- neither ------------------------------------------------------------------------------------------------------

    def _unflagged(self, layer: int, facts: words.Facts) -> LayerVerdict:
        """Effective only where every reference costs clearly more, and none might have cost less with more steps."""
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
        closest = min(straddling or unsettled or evidence, key=lambda e: (_distance(e), *_cheapest(e)))
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


def _in_wrong_order(proven: Sequence[Evidence], others: Mapping[int, Evidence]) -> dict[int, Evidence]:
    """Pairs that do better in each other's place, the best first, each layer once.

    Where something else does better still, in these or in other layers, the fault is there: a layer behind another that
    is hurt may do less harm in another place.
    """
    rival = max((e.gap_select for e in others.values()), default=0.0)
    found: dict[int, Evidence] = {}
    exchanges = [e for e in proven if e.score.reference.kind == "exchange"]
    for e in sorted(exchanges, key=lambda e: e.gap_select, reverse=True):
        pair = (e.score.reference.layer, e.score.reference.target)
        if not set(pair) & set(found) and e.gap_select > rival:
            found |= dict.fromkeys(pair, e)
    return found


def _in_rank(verdict: LayerVerdict) -> LayerVerdict:
    """The layers that something was found in come first, whatever else is measured of the others."""
    if verdict.score is None:
        return verdict
    rank = max if verdict.verdict in ("surpassed", "matched") else min
    return replace(verdict, score=rank(verdict.score, _FOUND))


def _best_on_select(evidence: Sequence[Evidence]) -> Evidence | None:
    """The reference that on `select` is furthest above what it must gain: the only one that is tested on `eval`."""
    return min(evidence, key=lambda e: (e.gap_threshold - e.gap_select, *_cheapest(e)), default=None)


def _cheapest(e: Evidence) -> tuple[float, str]:
    """What decides a tie: an idle part makes several references exactly alike."""
    return e.score.reference.bits, e.score.reference.key


def _distance(e: Evidence) -> float:
    """How far the cost of a reference lies above a match, in units of what it usually costs."""
    return (e.cost.mean - e.margin) / max(e.usual, 1e-12)
