"""`identity`: drop a block's update, or that of its attention or its MLP. Nothing is fitted; it costs 0 bits."""

from __future__ import annotations

from collections.abc import Iterator

from peelcli.records import SUBLAYERS, Reference
from peelcli.references.plan import Plan


def references(layer: int, plan: Plan) -> Iterator[Reference]:
    """The block, then its sublayers where they can be told apart.

    With every block left out: is anything learned at all? With the last ones left out, in a damaged network: from which
    block on does the network's own head read the states worse than before it?
    """
    yield Reference("identity", layer, layer)
    if layer < plan.num_layers and (layer == 1 or plan.is_damaged):
        yield Reference("identity", layer, plan.num_layers)
    if plan.has_sublayers(layer):
        for name in SUBLAYERS:
            yield Reference("identity", layer, layer, name)
