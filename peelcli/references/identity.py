"""`identity`: drop a block's update, or that of its attention or its MLP. Nothing is fitted; it costs 0 bits."""

from __future__ import annotations

from collections.abc import Iterator

from peelcli.records import SUBLAYERS, Reference
from peelcli.references.plan import Plan


def references(layer: int, plan: Plan) -> Iterator[Reference]:
    """The block, then its sublayers where they can be told apart."""
    yield Reference("identity", layer, layer)
    if layer == 1 and plan.num_layers > 1:  # every block at once: is anything learned at all?
        yield Reference("identity", 1, plan.num_layers)
    if plan.has_sublayers(layer):
        for name in SUBLAYERS:
            yield Reference("identity", layer, layer, name)
