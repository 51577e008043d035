"""Which layers a report shows when it is asked for the worst few only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peelcli.errors import UsageError
from peelcli.records import AuditResult, LayerVerdict


def shown_layers(results: Sequence[AuditResult], top: int | None) -> tuple[frozenset[int], tuple[int, ...]]:
    """The layers to show and those left out: all, or the `top` with the highest score in any of the runs.

    A broken layer without a score comes first, any other without one last; ties go to the lower layer. Raises
    UsageError where `top` is below 1.
    """
    if top is not None and top < 1:
        raise UsageError(f"--top {top}: expected a number of layers of at least 1; leave it out to see all")
    ranks: dict[int, float] = {}
    for result in results:
        for verdict in result.layers:
            ranks[verdict.layer] = max(ranks.get(verdict.layer, -math.inf), _rank(verdict))
    ordered = sorted(ranks, key=lambda layer: (-ranks[layer], layer))
    shown = ordered if top is None else ordered[:top]
    return frozenset(shown), tuple(sorted(set(ordered) - set(shown)))


def _rank(verdict: LayerVerdict) -> float:
    if verdict.score is None or math.isnan(verdict.score):
        return math.inf if verdict.verdict == "broken" else -math.inf
    return verdict.score
