"""Fit a block in a scheme to trained states, by mean squared error with a straight-through estimator.

    min over θ in Q of ‖B_θ(O_{l−1}) − O_t‖² / ‖O_t − O_{l−1}‖²        (arXiv 2605.02853; the ratio is `fvu`)

Latent weights are trained by Adam or by orthogonalised steps, scales by Adam, with step sizes relative to each matrix's
spread, so that one setting serves every width and every family. The state that is kept is the best on `select`, never
merely the last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peelcli.quant.fake_quantize import fake_quantize, quantize
from peelcli.quant.qparams import initial_qparams
from peelcli.quant.schemes import Scheme, scheme_named
from peelcli.records import FitOutcome
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.interface import Batch, Budget, Data, Forward, LinearMap, QuantizedMatrix, Replacement
from peelcli.references.micro_batches import add_gradients
from peelcli.references.muon import Muon
from peelcli.runtime.workers import in_parallel, one_thread

# In a scheme steps are large, with little momentum: a gradient changes at once when a code does. Orthogonalised steps
# come closest with whole blocks that start from the trained weights, for no more than their time where the batch is
# large. Of attention alone, of spans and of what starts from random weights Adam's do as well or better.
FREE_STEPS: dict[str, Any] = {"learning_rate": 0.04, "betas": (0.8, 0.95), "orthogonal": True}
FRESH_FREE_STEPS: dict[str, Any] = {"learning_rate": 0.03}
LOW_BIT_STEPS: dict[str, Any] = {"learning_rate": 0.08, "betas": (0.5, 0.95), "scale_rate": 0.5}
CLOSE_STEPS: dict[str, Any] = {
    "learning_rate": 0.06,
    "betas": (0.4, 0.9),
    "scale_rate": 2.0,
    "orthogonal": True,
}
CHECKS = 4  # how often the fit looks at `select`…
CHECKED = 8  # …and at how many of its sequences: enough to keep the best state, which `select` as a whole then judges
SETTLED = 0.05  # a last stretch that gains less than this share of the error has converged

# A witness and its error, and what measures errors → a better one and its error.
Finish = Callable[[Replacement, float, Callable[[Replacement], float]], tuple[Replacement, float]]


@dataclass
class _Parameters:
    """What is trained: latent weights (…, d_out, d_in) and their scales (…, d_out, n_groups), by name.

    Zero points, where the scheme has them, stay as they are.
    """

    maps: Sequence[LinearMap]
    latent: dict[str, Tensor]
    scale: dict[str, Tensor]
    zero_point: dict[str, Tensor | None]
    spec: QuantSpec

    def weights(self) -> dict[str, Tensor]:
        out = {}
        for m in self.maps:
            value = fake_quantize(
                self.latent[m.name],
                self.scale[m.name],
                self.spec,
                self.zero_point[m.name],
            )
            out[m.name] = (value.transpose(-1, -2) if m.transposed else value).to(m.weight.dtype)
        return out

    @torch.no_grad()
    def replacement(self) -> Replacement:
        if self.spec.scheme == "fp":
            return Replacement(plain={k: v.detach().clone() for k, v in self.weights().items()})
        return Replacement({m.name: self._matrix(m) for m in self.maps})

    def _matrix(self, m: LinearMap) -> QuantizedMatrix:
        scale, zero_point = self.scale[m.name].detach(), self.zero_point[m.name]
        codes = quantize(self.latent[m.name], scale, self.spec, zero_point)
        return QuantizedMatrix(
            codes,
            scale.clone(),
            self.spec,
            m.transposed,
            zero_point,
        )


def start_parameters(
    maps: Sequence[LinearMap],
    spec: QuantSpec,
    start: str,
    seed: int,
) -> _Parameters:
    """Latent weights from the trained ones, or random of the same spread; scales by the spec's rule."""
    generator = torch.Generator().manual_seed(seed)
    latent, scale, zero_point = {}, {}, {}
    for m in maps:
        weight = m.oriented().detach().float().clone()
        if start == "fresh":
            spread = weight.std()
            weight = torch.randn(weight.shape, generator=generator).to(weight.device) * spread
        latent[m.name] = weight.requires_grad_()
        found, zero_point[m.name] = initial_qparams(weight.detach(), spec)
        scale[m.name] = found.requires_grad_(not scheme_named(spec.scheme).is_free)
    return _Parameters(maps, latent, scale, zero_point, spec)


def fvu(
    forward: Forward,
    weights: Mapping[str, Tensor],
    data: Data,
    batch_size: int,
    limit: int | None = None,
    *,
    at_once: bool = False,
) -> float:
    """Fraction of the update O_t − O_{l−1} that the block with `weights` leaves unexplained, over `data`."""
    weights = {name: value.detach() for name, value in weights.items()}

    def sums(batch: Batch) -> tuple[float, float]:
        out = forward(batch.inputs, batch.ids, weights)
        error = float((out.float() - batch.targets.float()).square().sum())
        return error, float((batch.targets.float() - batch.inputs.float()).square().sum())

    error = update = 0.0
    for more, moved in in_parallel(sums, batches(data, batch_size, limit), at_once=at_once):
        error, update = error + more, update + moved
    return error / max(update, 1e-30)


def batches(data: Data, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """`data`, or the first `limit` sequences of it, in order."""
    count = len(data) if limit is None else min(limit, len(data))
    for at in range(0, count, batch_size):
        yield data.batch(range(at, min(at + batch_size, count)))


def fit_regression(
    forward: Forward,
    maps: Sequence[LinearMap],
    spec: QuantSpec,
    fit: Data,
    select: Data,
    budget: Budget,
    finish: Finish | None = None,
) -> tuple[Replacement, FitOutcome]:
    """Fit `maps` as `spec` says so that the block reproduces `fit`'s targets; returns the best state on `select`.

    finish: improves the best state of the steps, where the scheme is not free.
    """
    began = time.perf_counter()
    parameters = start_parameters(maps, spec, budget.start, budget.seed)
    optimizers = _optimizers(parameters, budget)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    order = sequence_order(len(fit), budget)
    check_every = max(1, math.ceil(budget.steps / CHECKS))

    def error_of(weights: Mapping[str, Tensor]) -> float:
        return fvu(forward, weights, select, budget.batch_size, CHECKED, at_once=budget.at_once)

    curve = [error_of(parameters.weights())]
    best, best_witness, running = curve[0], parameters.replacement(), 0.0
    for step in range(budget.steps):
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * (1.0 - step / budget.steps)
        batch = fit.batch(order[step])
        update = (batch.targets.float() - batch.inputs.float()).square().sum().clamp_min(1e-30)

        def loss(weights: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
            part = slice(rows[0], rows[-1] + 1)
            out = forward(batch.inputs[part], batch.ids[part], weights)  # noqa: B023  called before the next batch
            return (out.float() - batch.targets[part].float()).square().sum() / update  # noqa: B023

        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        value = add_gradients(loss, parameters.weights(), range(len(batch.ids)), at_once=budget.at_once)
        with one_thread(alone=budget.at_once):
            for optimizer in optimizers:
                optimizer.step()
        running = value if step == 0 else 0.8 * running + 0.2 * value
        if (step + 1) % check_every == 0 or step + 1 == budget.steps:
            curve.append(error_of(parameters.weights()))
            if curve[-1] < best:
                best, best_witness = curve[-1], parameters.replacement()
    converged, reason = _verdict_on(curve)
    if finish is not None and not scheme_named(spec.scheme).is_free:

        def on_select(replacement: Replacement) -> float:
            return error_of(replacement.weights(maps[0].weight))

        best_witness, best = finish(best_witness, best, on_select)
    outcome = FitOutcome(
        budget.start, budget.steps, converged, reason, running, None, round(time.perf_counter() - began, 3)
    )
    return best_witness, outcome


def step_sizes(scheme: Scheme, start: str, *, closely: bool = False) -> dict[str, Any]:
    """What a budget says of the steps of a fit in this scheme from this start; closely: of a whole block."""
    if not scheme.is_free:
        return CLOSE_STEPS if closely else LOW_BIT_STEPS
    return FRESH_FREE_STEPS if start == "fresh" else FREE_STEPS


def _optimizers(parameters: _Parameters, budget: Budget) -> list[torch.optim.Optimizer]:
    """Of the weights and, in a scheme, of their scales; step sizes are relative to each matrix's own."""
    weights, scales = [], []
    for m in parameters.maps:
        latent, scale = parameters.latent[m.name], parameters.scale[m.name]
        spread = max(float(latent.detach().square().mean().sqrt()), 1e-12)
        weights.append({"params": [latent], "lr": budget.learning_rate * spread})
        if scale.requires_grad:
            size = max(float(scale.detach().mean()), 1e-12)
            scales.append({"params": [scale], "lr": budget.scale_rate * budget.learning_rate * size})
    adam = partial(torch.optim.Adam, betas=budget.betas, fused=parameters.maps[0].weight.is_cuda)
    if not budget.orthogonal:
        return [adam([*weights, *scales])]
    return [Muon(weights, budget.betas[0]), *([adam(scales)] if scales else [])]


def sequence_order(n_seq: int, budget: Budget) -> list[list[int]]:
    """Rows of each step: shuffled epochs over the sequences."""
    generator = torch.Generator().manual_seed(budget.seed)
    rows: list[int] = []
    while len(rows) < budget.steps * budget.batch_size:
        rows += torch.randperm(n_seq, generator=generator).tolist()
    return [rows[i * budget.batch_size : (i + 1) * budget.batch_size] for i in range(budget.steps)]


def _verdict_on(curve: Sequence[float]) -> tuple[bool, str]:
    """Whether the error on `select` had settled when the steps ran out."""
    if not all(value == value and value != float("inf") for value in curve):
        return False, "the error was not finite"
    if len(curve) < 3:
        return True, "nothing to fit"
    earlier = min(curve[:-2])
    gain = (earlier - min(curve)) / max(earlier, 1e-30)
    if min(curve) < 1e-6:
        return True, "the error is zero"
    if gain <= SETTLED:
        return True, f"the last half of the steps gained {max(gain, 0.0):.1%}"
    return False, f"still gaining: {gain:.1%} in the last half of the steps"
