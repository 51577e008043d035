"""The table of kinds, and which references a plan calls for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from peelcli.records import Reference
from peelcli.references import challenge, direct, exchange, identity, rescale, rollback, span
from peelcli.references.plan import Plan

KINDS: dict[str, Callable[[int, Plan], Iterator[Reference]]] = {
    "identity": identity.references,
    "direct": direct.references,
    "span": span.references,
    "challenge": challenge.references,
    "rescale": rescale.references,
    "exchange": exchange.references,
    "rollback": rollback.references,
}


def references_of(layer: int, plan: Plan) -> tuple[Reference, ...]:
    """Every reference that begins at `layer`, the ladder's last."""
    found = [r for kind in plan.kinds for r in KINDS[kind](layer, plan)]
    if "direct" in plan.kinds:
        found += direct.ladder(layer, plan)
    return tuple(found)
