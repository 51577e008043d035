"""Finish a fit with the direct solver: the matrices that write to the residual stream, solved for what still lacks.

With all else in place the block's output is a linear function of the last of them: its part of the problem is quadratic
and solved as such. For the others it is nearly so: what the later sublayer makes of a change is taken into account by
the Gauss-Newton diagonal, and the last one is solved anew after each. Every proposal is measured before it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from peelcli.quant.solver import damped, least_squares_target, solve
from peelcli.references.interface import Data, LinearMap, Replacement

# Tokens that a solution is found on: so many for each feature that enters the matrix, and so many at the least.
TOKENS_A_FEATURE, LEAST_TOKENS = 48, 8192
SWEEPS = 4  # of descent, from a good start: what comes after gains next to nothing
STEPS = (1.0, 0.5)  # shares of the way to the target that are tried, where the problem is not quadratic
FLAT = 0.1  # of the mean curvature, added to each output's: outputs that hardly matter move little


class Block(Protocol):
    """A block that tells how its error answers to what a matrix gives."""

    def pull(
        self, hidden: Tensor, ids: Tensor, targets: Tensor, weights: Mapping[str, Tensor], name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What enters the matrix (n_tokens, d_in); negative gradient and curvature probe (n_tokens, d_out)."""
        ...


class _Moments(NamedTuple):
    """Over tokens: Σ x xᵀ (d_in, d_in), Σ change xᵀ (d_out, d_in), and the mean square of the probe (d_out,)."""

    hessian: Tensor
    missing: Tensor
    curvature: Tensor


class Refinement:
    """The last steps of one fit, in its scheme."""

    def __init__(
        self,
        block: Block,
        residual: Sequence[LinearMap],
        fit: Data,
        batch_size: int,
        *,
        rounds: int = 1,
    ) -> None:
        """residual: those of the fitted matrices that write to the residual stream, in the order in which they run.

        rounds: after the last of them, how often all those before it, each with the last again.
        """
        self.block, self.residual, self.fit, self.batch_size = block, residual, fit, batch_size
        self.rounds = rounds

    @torch.no_grad()
    def __call__(
        self, replacement: Replacement, error: float, measure: Callable[[Replacement], float]
    ) -> tuple[Replacement, float]:
        """The best witness that is found, and its error by `measure`; never worse than the one given."""
        if not self.residual:
            return replacement, error
        *others, last = self.residual
        again = [m for other in reversed(others) for m in (other, last)]
        for m in (last, *again * self.rounds):
            moments = self._moments(replacement, m)
            for step in STEPS:
                found = self._solved(replacement, m, moments, step)
                value = measure(found)
                if value < error:
                    replacement, error = found, value
                    break
        return replacement, error

    def _moments(self, replacement: Replacement, m: LinearMap) -> _Moments:
        weights = replacement.weights(m.weight)
        d_out, d_in = replacement.quantized[m.name].codes.shape
        device = m.weight.device
        hessian, missing = torch.zeros(d_in, d_in, device=device), torch.zeros(d_out, d_in, device=device)
        curvature = torch.zeros(d_out, device=device)
        at = tokens = 0
        while at < len(self.fit) and tokens < max(TOKENS_A_FEATURE * d_in, LEAST_TOKENS):
            batch = self.fit.batch(range(at, min(at + self.batch_size, len(self.fit))))
            pulled = self.block.pull(batch.inputs, batch.ids, batch.targets, weights, m.name)
            x, change, probe = (t.float() for t in pulled)
            hessian.addmm_(x.T, x)
            missing.addmm_(change.T, x)
            curvature += probe.square().sum(0)
            at, tokens = at + self.batch_size, tokens + len(x)
        return _Moments(hessian, missing, curvature / tokens)

    def _solved(self, replacement: Replacement, m: LinearMap, moments: _Moments, step: float) -> Replacement:
        """`witness` with one matrix solved, all others as they are."""
        old = replacement.quantized[m.name]
        mean = moments.hessian.diagonal().mean()
        if not (mean > 0 and all(torch.isfinite(t).all() for t in moments)):
            return replacement
        hessian = damped(moments.hessian)
        curvature = (moments.curvature + FLAT * moments.curvature.mean()) / (1 + FLAT)
        missing = step * moments.missing / curvature.clamp_min(1e-12).unsqueeze(-1) / mean
        now = replace(old, transposed=False).weight(hessian)
        target = least_squares_target(now, hessian, missing)
        codes, scale = solve(
            target,
            hessian,
            old.spec,
            starts=(1.0,),
            known=(old.codes.to(hessian.device), old.scale.to(hessian.device)),
            max_sweeps=SWEEPS,
            qparams=None if old.zero_point is None else (old.scale, old.zero_point),
        )
        solved = replace(old, codes=codes, scale=scale)
        return Replacement({**replacement.quantized, m.name: solved}, replacement.plain)
