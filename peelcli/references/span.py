"""`span`: one block in the scheme does the work of two or of three."""

from __future__ import annotations

from collections.abc import Iterator

from peelcli.quant.schemes import scheme_named
from peelcli.records import Reference
from peelcli.references.plan import Plan

LENGTHS = (2, 3)


def references(layer: int, plan: Plan) -> Iterator[Reference]:
    """Spans that begin at `layer`, fitted to the output of their last layer."""
    bits = scheme_named(plan.scheme).num_bits
    for length in LENGTHS:
        target = layer + length - 1
        if target <= plan.num_layers:
            yield Reference("span", layer, target, None, *plan.spec.grid, bits / length)
