"""`direct`: the same block, or one of its sublayers, in the scheme, fitted to the trained output of the block.

The ladder of further schemes is fitted for the whole block only: it serves `effective_bits`, never a flag.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peelcli.quant.schemes import scheme_named
from peelcli.records import SUBLAYERS, Reference
from peelcli.references.plan import Plan


def references(layer: int, plan: Plan) -> Iterator[Reference]:
    """The block and its sublayers in the run's scheme."""
    bits = scheme_named(plan.scheme).num_bits
    parts = (None, *SUBLAYERS) if plan.has_sublayers(layer) else (None,)
    for part in parts:
        yield Reference("direct", layer, layer, part, *plan.spec.grid, bits)


def ladder(layer: int, plan: Plan) -> Iterator[Reference]:
    """The block in every other scheme of fewer bits than the layer's own."""
    for name in plan.ladder:
        bits = scheme_named(name).num_bits
        if name != plan.scheme and bits < plan.layer_bits[layer]:
            yield Reference("direct", layer, layer, None, *replace(plan.spec, scheme=name).grid, bits)
