"""The evidence of one run, laid out by layer and by kind: what the rules read their figures from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import median

import numpy as np

from peelcli.records import Run, Score
from peelcli.verdict.end_to_end_gains import Gain, challenge_excess, rescale_excess
from peelcli.verdict.evidence import Evidence, cheapest, fair_share, in_class, is_lighter, own_bits
from peelcli.verdict.policy import TINY, Policy
from peelcli.verdict.screening import left_open
from peelcli.verdict.words import Facts


class Table:
    """What was measured in a run, as evidence under one policy."""

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
        self.exchanges = [e for e in exchanges if not self.is_open(e)]
        self.spans = [e for e in evidence if e.score.reference.is_span and in_class(run, e.score)]
        self.drops = {
            n: e
            for n, es in self.by_layer.items()
            for e in es
            if e.score.reference.is_drop and e.score.reference.sublayer is None
        }
        self.excess = {n: x for n, x in challenge_excess(run, policy).items() if n in run.layers}
        rescales = {} if foreign else rescale_excess(run, policy)
        self.rescales = {part: x for part, x in rescales.items() if not self.is_open(x)}

    def is_open(self, finding: Evidence | Gain) -> bool:
        """Whether the reference was measured on too few sequences for this policy to rest a verdict on it."""
        return finding.score.reference.key in self.open

    def left_open(self, layer: int, flagged: Collection[int]) -> Score | None:
        """A reference that may yet flag the layer, by what it does on all of `eval`."""
        for score in self.open.values():
            inside = range(score.reference.layer, score.reference.target + 1)
            if layer in inside and not set(inside) & set(flagged):
                return score
        return None

    def wholes(self, layer: int, part: Evidence) -> list[Evidence]:
        """References of the same kind for the whole block: where one says the same, the block is to blame."""
        if part.score.reference.sublayer is None:
            return []
        is_drop = part.score.reference.is_drop  # what is not dropped here is fitted to states
        return [
            e
            for e in self.deciding[layer]
            if e.score.reference.sublayer is None and e.score.reference.is_drop == is_drop
        ]

    def _drop_cost(self, layer: int) -> float | None:
        return -self.drops[layer].gap.mean if layer in self.drops else None

    def facts(self, layer: int, surpassing: Evidence | None = None) -> Facts:
        """The figures that every verdict of a layer carries. surpassing: the reference that surpasses it, if any."""
        evidence = self.by_layer[layer]
        blocks = [e for e in evidence if e.score.reference.sublayer is None]
        own = own_bits(self.run, layer)
        fitted = [
            e
            for e in blocks
            if not e.score.reference.is_drop and not e.score.reference.orders_schemes(self.run.scheme)
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
            relative.append(1.0 + surpassing.gap.mean / max(self.worth(layer), TINY))
        limit = self.policy.score_limit
        return Facts(
            own_bits=own,
            effective_bits=self._effective_bits(layer, blocks),
            fvu=fitted[0].score.fit.fvu_eval if fitted else None,
            drop_cost=self._drop_cost(layer),
            score=float(np.clip(max(relative), -limit, limit)) if relative else None,
            foreign=self.foreign,
        )

    def _effective_bits(self, layer: int, blocks: Sequence[Evidence]) -> float | None:
        """Bits of the cheapest stand-in for the whole block whose cost is small against what dropping a layer costs."""
        margin = self.policy.effective_share * self.worth(layer)
        limit = self.policy.divergence_factor * margin
        cheap = [e.score.reference.bits for e in blocks if e.cost.high < margin and e.divergence < limit]
        return min(cheap, default=None)

    def worth(self, layer: int) -> float:
        """What a layer is worth, in nats per token: what dropping another costs, or else an even share."""
        drops = [e.cost.mean for n, e in self.drops.items() if n != layer]
        return median(drops) if len(drops) > 1 else fair_share(self.run)


def best_on_select(evidence: Sequence[Evidence]) -> Evidence | None:
    """The reference that on `select` is furthest above what it must gain: the only one that is tested on `eval`."""
    return min(evidence, key=lambda e: (e.gap_threshold - e.gap_select, *cheapest(e)), default=None)
