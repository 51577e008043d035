"""Which layers a lighter reference matches, alone or as one of several, tested over all layers together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from peelcli.verdict.downstream import Behind
from peelcli.verdict.evidence import Evidence, cheapest, is_lighter
from peelcli.verdict.statistics import holm_of
from peelcli.verdict.table import Table


def matches(table: Table, e: Evidence) -> bool:
    """A match leaves the predictions alone, too: equal losses by chance, of other predictions, are none."""
    return (
        e.margin > 0
        and not table.is_open(e)
        and is_lighter(table.run, e.score)
        and e.divergence < table.policy.divergence_factor * e.widest
    )


def find_matched(table: Table, taken: set[int]) -> dict[int, Evidence]:
    """The reference that matches each layer beyond chance. taken: layers that something surpasses already."""
    best: dict[int, Evidence] = {}
    tried: dict[int, int] = {}
    for layer in table.run.layers:
        fair = [e for e in table.deciding[layer] if matches(table, e)]
        if layer not in taken and fair:
            best[layer] = min(fair, key=lambda e: (_chance_on_select(table, e), *cheapest(e)))
            # The divergence is known on `eval` alone: what is chosen by it pays for every candidate.
            tried[layer] = len(fair) if table.foreign else 1
    p_values = {n: min(1.0, tried[n] * best[n].p_matched) if n in best else 1.0 for n in table.run.layers}
    rejected = holm_of(p_values, table.alpha)
    return {
        n: next((o for o in table.wholes(n, e) if matches(table, o) and o.costs_less), e)
        for n, e in best.items()
        if rejected[n] and e.costs_less
    }


def _chance_on_select(table: Table, e: Evidence) -> float:
    """What orders the candidates: a fit costs little next to a tiny margin, and less surely than a drop does."""
    return e.divergence / e.margin if table.foreign else e.p_matched_select


def find_spanned(table: Table, causes: Mapping[int, int]) -> tuple[dict[int, Evidence], dict[int, Behind]]:
    """A span that matches blames the layer in it that is cheapest to drop, unless another's fault explains it.

    causes: the layers that something was found in already, and of each the layer whose fault that is.
    """
    rejected = holm_of(
        {i: e.p_matched if matches(table, e) else 1.0 for i, e in enumerate(table.spans)}, table.alpha
    )
    fair = [e for i, e in enumerate(table.spans) if rejected[i] and e.costs_less]
    found: dict[int, Evidence] = {}
    behind: dict[int, Behind] = {}
    explained = dict(causes)
    for e in sorted(fair, key=lambda e: (e.cost.mean / e.margin, *cheapest(e))):
        inside = range(e.score.reference.layer, e.score.reference.target + 1)
        # A layer that was not audited may hold the fault: then none is blamed.
        if not set(inside) <= set(table.by_layer):
            continue
        idlest = min(inside, key=lambda n: table.drops[n].cost.mean if n in table.drops else math.inf)
        # One fault explains spans that overlap.
        cause = next((explained[n] for n in inside if n in explained), None)
        if cause is None:
            explained |= dict.fromkeys(inside, idlest)
            found[idlest] = e
        elif idlest not in explained:
            behind.setdefault(idlest, Behind(cause, e))
    return found, behind
