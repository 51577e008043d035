"""Gradient steps for matrices in which no direction counts more than another: orthogonalised momentum.

Muon (K. Jordan and others, 2024; arXiv 2502.16982), in blocks of rows: the momentum M = U S Vᵀ is replaced by U Vᵀ,
nearly, by a few Newton-Schulz iterations. What the inputs of a block have in common dominates its gradients; a handful
of steps by Adam goes mostly there, while these move every code that is near to turning. Steps have the same root mean
square whatever the shape, so that a step size relative to a weight's spread holds for any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

ITERATIONS = 4  # as close in twenty steps as exact factors, on the shared checkpoint; two are not
BLOCK_ROWS = 256  # with 2048 tokens a step half as long as their gradient takes, whatever the width
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial, as published


def orthogonalized(matrix: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Near to U Vᵀ of `matrix` (…, d_out, d_in), float32, with a root mean square of 1; 0 where it is 0.

    Of more than `BLOCK_ROWS` rows blocks of equally many are made orthogonal each on its own: for the whole it would
    take several times as long as the gradient of a few thousand tokens does.
    """
    d_out = matrix.shape[-2]
    count = -(-d_out // BLOCK_ROWS)
    size = -(-d_out // count)
    x: Tensor = nn.functional.pad(matrix.float(), (0, 0, 0, count * size - d_out)).unflatten(
        -2, (count, size)
    )
    tall = size > matrix.shape[-1]
    x = x.mT if tall else x  # the smaller side's products are cheaper
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    if x.device.type != "cpu":
        x = x.bfloat16()
    first, third, fifth = _COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * (gram @ gram)) @ x
    x = (x.mT if tall else x).flatten(-3, -2)[..., :d_out, :].float()
    return x / x.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-30)


class Muon(torch.optim.Optimizer):
    """lr is the root mean square of what a step changes in each matrix (…, d_out, d_in)."""

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float) -> None:
        """momentum: the share of the last direction that goes into the next."""
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step along the gradients that are there, or that `closure` makes; returns what that returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                weight.sub_(orthogonalized(momentum), alpha=group["lr"])
        return loss
