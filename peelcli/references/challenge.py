"""`challenge`: the layer itself, trained on through the frozen rest of the network by cross-entropy.

It keeps the layer's own precision. Driven too hard it gets worse and says nothing, so the state that is kept is the
best by its loss on a part of `select`, and the trained weights are one of the candidates: its gap there is never below
zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from peelcli.records import FitOutcome, Reference
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.interface import Batch, Budget, Data, LinearMap, Replacement
from peelcli.references.micro_batches import add_gradients
from peelcli.references.plan import Plan
from peelcli.references.regression import CHECKS, batches, sequence_order, start_parameters
from peelcli.runtime.workers import in_parallel

CHECKED = 16  # sequences of `select` that tell the best state

Loss = Callable[[Mapping[str, Tensor], Batch], Tensor]


def references(layer: int, plan: Plan) -> Iterator[Reference]:
    """One per layer, in the layer's own precision."""
    yield Reference("challenge", layer, layer, None, None, None, plan.layer_bits[layer])


@torch.no_grad()
def mean_loss(
    loss: Loss,
    weights: Mapping[str, Tensor],
    data: Data,
    batch_size: int,
    limit: int | None = None,
    *,
    at_once: bool,
) -> float:
    """The mean of `loss` over the first `limit` sequences, several batches `at_once` or each by all threads."""
    each = in_parallel(
        lambda batch: float(loss(weights, batch)) * len(batch.ids),
        batches(data, batch_size, limit),
        at_once=at_once,
    )
    return sum(each) / (len(data) if limit is None else min(limit, len(data)))


def fit_challenge(
    loss: Loss,
    trained: Mapping[str, Tensor],
    maps: Sequence[LinearMap],
    grids: Mapping[str, QuantSpec | None],
    fit: Data,
    select: Data,
    budget: Budget,
) -> tuple[Replacement, FitOutcome]:
    """Train one layer on; `loss(weights, batch)` is the mean next-token CE with those weights in place.

    trained: the layer's parameters. grids: of the matrices that run in few bits, the spec that they lie in, and
    stay in, through the straight-through estimator; None for one that lies on a grid of another kind (with
    zero points, or a codebook): it stays as it is. All else is trained in full precision.
    """
    began = time.perf_counter()
    on_grids = [
        start_parameters([m for m in maps if grids.get(m.name) == spec], spec, "warm", budget.seed)
        for spec in dict.fromkeys(s for s in grids.values() if s is not None)
    ]
    # In half precision most steps would round to none.
    free = {k: v.detach() for k, v in trained.items() if k not in grids}
    plain = {k: v.to(torch.float32, copy=True).requires_grad_() for k, v in free.items()}

    def weights() -> dict[str, Tensor]:
        found = {k: v.to(trained[k].dtype) for k, v in plain.items()}
        for quantized in on_grids:
            found |= quantized.weights()
        return found

    def replacement() -> Replacement:
        matrices = {n: m for quantized in on_grids for n, m in quantized.replacement().quantized.items()}
        return Replacement(
            matrices, {k: v.detach().to(trained[k].dtype, copy=True) for k, v in plain.items()}
        )

    def on_select() -> float:
        return mean_loss(loss, weights(), select, budget.batch_size, CHECKED, at_once=budget.at_once)

    groups = [{"params": [p], "lr": _rate(p, budget)} for p in plain.values()]
    for quantized in on_grids:
        groups += [{"params": [p], "lr": _rate(p, budget)} for p in quantized.latent.values()]
        groups += [{"params": [p], "lr": _rate(p, budget)} for p in quantized.scale.values()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98), fused=any(v.is_cuda for v in trained.values()))
    rates = [group["lr"] for group in optimizer.param_groups]
    order = sequence_order(len(fit), budget)
    check_every = max(1, budget.steps // CHECKS)

    def part_of(now: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
        """What some sequences of a batch add to its mean loss."""
        return loss(now, fit.batch(rows)) * (len(rows) / budget.batch_size)

    curve = [on_select()]
    best, best_witness, kept = curve[0], replacement(), 0
    for step in range(budget.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1.0 - step / budget.steps)
        optimizer.zero_grad(set_to_none=True)
        add_gradients(part_of, weights(), order[step], at_once=budget.at_once)
        optimizer.step()
        if (step + 1) % check_every == 0 or step + 1 == budget.steps:
            curve.append(on_select())
            if curve[-1] < best:
                best, best_witness, kept = curve[-1], replacement(), step + 1
    gained = [max(a - min(curve), 0.0) for a in (curve[0], min(curve[:-2] or curve))]
    converged = gained[1] <= 0.25 * gained[0] + 1e-4
    reason = f"kept the state of step {kept}: {gained[0]:.4f} nats gained on select"
    return best_witness, FitOutcome(
        "trained", budget.steps, converged, reason, None, None, round(time.perf_counter() - began, 3)
    )


def _rate(parameter: Tensor, budget: Budget) -> float:
    """A step relative to the spread of the parameter, so that one setting serves every width."""
    return budget.learning_rate * max(float(parameter.detach().float().square().mean().sqrt()), 1e-6)
