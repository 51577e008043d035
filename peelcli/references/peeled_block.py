"""Fit one block of a peeled path: from the peeled input Z to a trained state O_t, in the scheme.

Two steps. The matrices whose output is added to the residual stream are linear maps with a quadratic loss, solved in
closed form (the least squares of arXiv 2410.10984, carried over to blocks): every way to start that this gives is
measured on `select`, the weights as they are among them. The best is then trained as a whole, by gradient descent.

With free weights the block is never worse, on the tokens it is fitted to, than one that passes Z on: both matrices
solved one after the other, each on what is left, can only lower the error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from peelcli.quant.fake_quantize import fake_quantize
from peelcli.quant.qparams import initial_qparams
from peelcli.quant.schemes import scheme_named
from peelcli.records import FitOutcome
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.interface import Batch, Budget, Data, LinearMap, Replacement
from peelcli.references.regression import CHECKED, batches, fit_regression, fvu
from peelcli.runtime.workers import in_parallel

# Of the mean square of a feature: how hard a solved matrix is held to the one it was. The best on `select` is kept.
RIDGES = (1e-4, 1e-2, 1.0)
EXACT = 1e-9  # share of the update that is left: nothing to train
# Tokens that a matrix is solved on: so many for each feature that enters it, and so many at the least.
TOKENS_A_FEATURE, LEAST_TOKENS = 48, 8192


class Block(Protocol):
    """A block as a function, with a look inside."""

    @property
    def maps(self) -> Sequence[LinearMap]:
        """Its weight matrices, as trained."""
        ...

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """O (n, seq_len, d_model) from hidden of the same shape, `weights` put in place."""
        ...

    def features(
        self, hidden: Tensor, ids: Tensor, weights: Mapping[str, Tensor], name: str
    ) -> tuple[Tensor, Tensor]:
        """The output as above, and the input (n, seq_len, d_in) of the matrix of that name."""
        ...


def start_weights(maps: Sequence[LinearMap], start: str, seed: int) -> dict[str, Tensor]:
    """The matrices that a fit begins with: "warm", as they are, or "fresh", random of the same spread."""
    if start != "fresh":
        return {m.name: m.weight for m in maps}
    generator = torch.Generator().manual_seed(seed)
    return {
        m.name: (torch.randn(m.weight.shape, generator=generator) * float(m.weight.float().std())).to(
            m.weight
        )
        for m in maps
    }


@torch.no_grad()
def residual_maps(block: Block, hidden: Tensor, ids: Tensor) -> tuple[LinearMap, ...]:
    """The matrices W that add x·Wᵀ to the residual stream, in their order; x does not depend on those after it.

    With the later ones at zero the block's output is an affine function of each. Found by trying, from the last one
    up, on a batch: hidden (n, seq_len, d_model). A family that normalises what a sublayer adds has none.
    """
    found: list[LinearMap] = []
    silent: dict[str, Tensor] = {}  # the later ones
    for m in reversed(block.maps):
        if m.weight.ndim != 2 or len(m.oriented()) != hidden.shape[-1]:
            continue
        generator = torch.Generator(m.weight.device).manual_seed(0)
        trial = torch.randn(m.weight.shape, generator=generator, device=m.weight.device).to(m.weight)
        out, x = block.features(hidden, ids, silent | {m.name: trial}, m.name)
        without = block(hidden, ids, silent | {m.name: torch.zeros_like(trial)})
        if x.shape[:-1] != out.shape[:-1]:
            continue
        update = x @ (trial if m.transposed else trial.T)
        if torch.allclose(out - without, update, rtol=1e-2, atol=1e-3 * float(update.abs().max())):
            found.insert(0, m)
            silent[m.name] = torch.zeros_like(trial)
    return tuple(found)


class BlockStarts:
    """Ways to start the fits from one input: what does not depend on the target is computed once for all targets."""

    def __init__(
        self,
        residual: Sequence[LinearMap],
        weights: Mapping[str, Tensor],
        batch_size: int,
        *,
        at_once: bool = False,
    ) -> None:
        """residual: of `residual_maps`. weights: what `start_weights` gave. batch_size: sequences of a pass.

        at_once: whether the block may be called from several threads at once, and gains by it.
        """
        self.residual, self.weights, self.batch_size = residual, dict(weights), batch_size
        self.at_once = at_once
        self._grams: dict[str, Tensor] = {}

    def candidates(self, block: Block, fit: Data, select: Data) -> Iterator[dict[str, Tensor]]:
        """The weights themselves; with the last residual matrix solved; with all of them solved, from nothing."""
        yield self.weights
        if self.residual:
            yield self._solved(block, self.weights, self.residual[-1], fit, select, "last")
        if len(self.residual) > 1:
            weights = self.weights | {m.name: torch.zeros_like(m.weight) for m in self.residual}
            for place, m in enumerate(self.residual):
                weights = self._solved(block, weights, m, fit, select, "" if place else "first")
            yield weights

    def _solved(
        self, block: Block, weights: dict[str, Tensor], m: LinearMap, fit: Data, select: Data, shared: str
    ) -> dict[str, Tensor]:
        """`weights` with `m` solved; `shared` names the features' second moment where other targets have it too."""
        gram, moment = self._moments(block, weights, m, fit, shared)
        mean = gram.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        # (d_in, d_out), one for each ridge, of which `select` keeps one; or none, where all are worse than nothing.
        changes = [torch.cholesky_solve(moment, torch.linalg.cholesky(gram + r * mean * eye)) for r in RIDGES]

        def errors_of(batch: Batch) -> list[float]:
            out, x = block.features(batch.inputs, batch.ids, weights, m.name)
            left, x = (batch.targets.float() - out.float()), x.float()
            return [float((left - x @ change.float()).square().sum()) for change in changes]

        each = in_parallel(errors_of, batches(select, self.batch_size, CHECKED), at_once=self.at_once)
        errors = [sum(of_one) for of_one in zip(*each, strict=True)]
        change = changes[min(range(len(errors)), key=errors.__getitem__)].T.to(m.weight)  # (d_out, d_in)
        return weights | {m.name: weights[m.name] + (change.T if m.transposed else change)}

    def _moments(
        self, block: Block, weights: Mapping[str, Tensor], m: LinearMap, fit: Data, shared: str
    ) -> tuple[Tensor, Tensor]:
        """Σ xᵀx (d_in, d_in) and Σ xᵀ(target − out) (d_in, d_out), in double precision."""
        d_out, d_in = m.oriented().shape
        gram = self._grams.get(shared)
        known = gram is not None
        if gram is None:
            gram = torch.zeros(d_in, d_in, dtype=torch.float64, device=m.weight.device)
        moment = torch.zeros(d_in, d_out, dtype=torch.float64, device=m.weight.device)

        def inside(batch: Batch) -> tuple[Tensor, Tensor]:
            out, x = block.features(batch.inputs, batch.ids, weights, m.name)
            x = x.flatten(0, 1).double()  # (n·seq_len, d_in)
            return x, (batch.targets.double() - out.double()).flatten(0, 1)

        seq_len = fit.batch(range(1)).ids.shape[1]
        limit = math.ceil(max(TOKENS_A_FEATURE * d_in, LEAST_TOKENS) / seq_len)
        for x, left in in_parallel(inside, batches(fit, self.batch_size, limit), at_once=self.at_once):
            moment.addmm_(x.T, left)
            if not known:
                gram.addmm_(x.T, x)
        if shared:
            self._grams[shared] = gram
        return gram, moment


def fit_block(
    block: Block,
    starts: BlockStarts,
    spec: QuantSpec,
    fit: Data,
    select: Data,
    budget: Budget,
) -> tuple[Replacement, FitOutcome]:
    """The block of the scheme that comes closest to the targets on `select`, and how its fit went."""

    def left(weights: Mapping[str, Tensor]) -> float:
        in_scheme = {m.name: _in_scheme(m, weights[m.name], spec) for m in block.maps}
        return fvu(block, in_scheme, select, budget.batch_size, CHECKED, at_once=budget.at_once)

    error, weights = math.inf, starts.weights
    with torch.no_grad():
        for candidate in starts.candidates(block, fit, select):
            found = left(candidate)
            if found < error:
                error, weights = found, candidate
            if error < EXACT:
                break
    maps = [replace(m, weight=weights[m.name]) for m in block.maps]
    budget = replace(budget, steps=0 if error < EXACT else budget.steps, start="warm")
    with torch.enable_grad():
        return fit_regression(block, maps, spec, fit, select, budget)


def _in_scheme(m: LinearMap, weight: Tensor, spec: QuantSpec) -> Tensor:
    if scheme_named(spec.scheme).is_free:
        return weight
    oriented = replace(m, weight=weight).oriented().float()
    scale, zero_point = initial_qparams(oriented, spec)
    value = fake_quantize(oriented, scale, spec, zero_point)
    return (value.transpose(-1, -2) if m.transposed else value).to(weight.dtype)
