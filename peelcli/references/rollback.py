"""`rollback`: the same block as an earlier checkpoint of the run has it; finds stale shards and layers that got worse.

Nothing is fitted, so that it is not adapted to any text; it has the layer's own bits, so that it never matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from peelcli.records import FitOutcome, Reference
from peelcli.references.interface import Replacement
from peelcli.references.plan import Plan


def references(layer: int, plan: Plan) -> Iterator[Reference]:
    """One per earlier checkpoint, the newest first: each different block once, and none that is the layer itself."""
    seen = {plan.layer_hashes.get(layer)}
    for origin in reversed(plan.origins):
        block = origin.layer_hashes.get(
            layer, origin.id
        )  # where layers could not be told apart, all may differ
        if block in seen or layer in origin.non_finite:
            continue
        seen.add(block)
        bits = plan.layer_bits[layer]
        yield Reference("rollback", layer, layer, bits=bits, origin_id=origin.id, origin_step=origin.step)


def roll_back(weights: Mapping[str, Tensor]) -> tuple[Replacement, FitOutcome]:
    """The witness that an older block is: its parameters as they are, by their names within the block."""
    plain = {name: value.detach().cpu() for name, value in weights.items()}
    return Replacement(plain=plain), FitOutcome("earlier", 0, True, "nothing to fit: taken as it was")
