"""Which layers a lighter, older or exchanged reference surpasses, tested over all layers together."""

from __future__ import annotations

from collections.abc import Sequence

from peelcli.verdict.downstream import Behind, in_wrong_order
from peelcli.verdict.evidence import Evidence
from peelcli.verdict.statistics import holm_of
from peelcli.verdict.table import Table, best_on_select


def find_proven(table: Table) -> list[Evidence]:
    """The references that surpass a layer beyond chance.

    Up to two of a layer are tested: a drop that does well on `select` by luck must not crowd out a rollback.
    """
    tested = [
        e
        for n in table.run.layers
        for e in (best_on_select(table.deciding[n]), best_on_select(table.rollbacks[n]))
        if e is not None
    ]
    tested += table.exchanges
    rejected = holm_of({i: e.p_surpassed for i, e in enumerate(tested)}, table.alpha)
    return [e for i, e in enumerate(tested) if rejected[i] and e.surpasses]


def find_surpassed(table: Table, proven: Sequence[Evidence]) -> tuple[dict[int, Evidence], dict[int, Behind]]:
    """The reference that surpasses each layer, and the exchanged layers whose gain a stronger finding explains."""
    found = {
        e.score.reference.layer: e
        for e in sorted(proven, key=lambda e: e.gap_select)
        if not e.score.reference.is_exchange
    }
    exchanges, behind = in_wrong_order(proven, found)
    # A block that surpasses by less than its part does so thanks to that part.
    found = {
        n: next((o for o in table.wholes(n, e) if o.surpasses and o.gap.mean > e.gap.mean), e)
        for n, e in found.items()
    } | exchanges
    return found, {n: b for n, b in behind.items() if n not in found}
