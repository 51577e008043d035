"""`exchange`: two blocks in each other's place; finds layers that a conversion or a merge put in wrong order.

Nothing is fitted: the weights are the checkpoint's own. It has the layers' own bits, so that it never matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from peelcli.records import Reference
from peelcli.references.interface import Replacement
from peelcli.references.plan import Plan


def exchanged(weights: Mapping[str, Tensor]) -> Replacement:
    """What stands in for a block: the parameters of the other, by their names within the block."""
    return Replacement(plain={name: value.detach() for name, value in weights.items()})


def references(layer: int, plan: Plan) -> Iterator[Reference]:
    """One for each pair of audited layers that `layer` comes first in, unless both hold the same weights."""
    for after in plan.layers:
        hashes = [plan.layer_hashes.get(n) for n in (layer, after)]
        if (layer, after) in plan.exchangeable and (hashes[0] is None or hashes[0] != hashes[1]):
            yield Reference("exchange", layer, after, bits=max(plan.layer_bits[n] for n in (layer, after)))
