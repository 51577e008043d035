"""One step of a fit, its batch shared among threads.

The operations of a small block are too short to share, a whole pass of some sequences is not. How a batch is divided
depends on the batch alone, so that the number of threads changes no result; and no more of it is in memory than one
undivided pass would hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from peelcli.runtime.workers import in_parallel

T = TypeVar("T")

MICRO_BATCH = 2  # sequences: with one, what a call costs whatever its size begins to tell


def add_gradients(
    loss: Callable[[Mapping[str, Tensor], Sequence[T]], Tensor],
    weights: Mapping[str, Tensor],
    items: Sequence[T],
    *,
    at_once: bool,
) -> float:
    """Backpropagate Σ over the shards of `items` of loss(weights, shard); returns the sum.

    at_once: whether `loss` may be called from several threads at once; else all items are one shard. What lies behind
    `weights` (a straight-through estimator) is gone through once for all shards.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    size = MICRO_BATCH if at_once else len(items)

    def one(shard: Sequence[T]) -> tuple[float, tuple[Tensor | None, ...]]:
        with torch.enable_grad():
            value = loss(leaves, shard)
            # Not all weights need be used: a router may send no token to an expert.
            return float(value.detach()), torch.autograd.grad(
                value, tuple(leaves.values()), allow_unused=True
            )

    total = 0.0
    sums: list[Tensor | None] = [None] * len(leaves)
    shards = [items[at : at + size] for at in range(0, len(items), size)]
    for value, found in in_parallel(one, shards, at_once=at_once):
        total += value
        sums = [
            new if old is None else old if new is None else old + new
            for old, new in zip(sums, found, strict=True)
        ]
    used = [(weight, grad) for weight, grad in zip(weights.values(), sums, strict=True) if grad is not None]
    torch.autograd.backward([weight for weight, _ in used], [grad for _, grad in used])
    return total
