"""The fit of fully connected ReLU nets: each layer by least squares with a bias, then ReLU (arXiv 2410.10984).

W = T·pinv([Z; 1]), in single precision with pinv's default cutoff: singular values of [Z; 1] up to (its larger
dimension) × 2⁻²³ of the greatest count as none. The cutoff is part of the method; with that of double precision the
errors of deep paths change by per cents.

Here an orthonormal basis Q of [Z; 1]'s rows, in which a fit is T·Qᵀ, is reached through the second moment
[Z; 1][Z; 1]ᵀ, several times cheaper than a singular value decomposition. Squaring halves the digits, so that this part
is in double precision: the squared cutoff, 2⁻⁴⁶ and up, lies far above the rounding of its eigenvalues, 2⁻⁵². The last
layer, whose error is all that is asked of it, needs the basis' coordinates alone, and Q is not made for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from peelcli.errors import CheckpointError

# Of singular values, times the larger dimension: what torch.linalg.pinv does in single precision.
RELATIVE_CUTOFF = 2.0**-23
# Below this fraction of ‖Y‖², ‖Y‖² − ‖fitted‖² has lost too many digits: the error is read from the outputs instead.
LEAST_FRACTION = 1e-2
# Up to this condition the products T·Zᵀ can be made in single precision: their rounding, 2⁻²³, grows by it at most.
LARGEST_CONDITION = 300.0


@dataclass(frozen=True)
class Units:
    """Which units of a layer of `width` are kept: `live`, their indices, or None for all. The others give zero."""

    live: Tensor | None
    width: int

    def spread(self, kept: Tensor, dim: int) -> Tensor:
        """A tensor of the kept units along `dim`, with zeros for the others."""
        if self.live is None:
            return kept
        shape = list(kept.shape)
        shape[dim] = self.width
        return kept.new_zeros(shape).index_copy_(dim, self.live, kept)


@dataclass(frozen=True)
class States:
    """Outputs of a layer: those of the kept units, (d, n_samples) float32."""

    values: Tensor
    units: Units


@dataclass(frozen=True)
class Factor:
    """What all fits from one input Z share; r is the rank of [Z; 1]."""

    rows: Tensor  # [Z; 1], (d + 1, n_samples) float64
    coordinates: Tensor  # of Q in [Z; 1], (r, d + 1) float64
    condition: float | None  # of [Z; 1] at most; None where singular values were cut
    inputs: States  # Z

    @property
    def units(self) -> Units:
        """Of Z."""
        return self.inputs.units

    @cached_property
    def basis(self) -> Tensor:
        """Q, (r, n_samples) float32: orthonormal rows that span those of [Z; 1]."""
        if self.condition is None:
            return (self.coordinates @ self.rows).float()
        half = len(self.rows) // 2  # with none cut the coordinates are a lower triangle
        basis = torch.empty_like(self.rows)
        torch.mm(
            self.coordinates[:half, :half], self.rows[:half], out=basis[:half]
        )  # the rest of these is zero
        torch.mm(self.coordinates[half:], self.rows, out=basis[half:])
        return basis.float()

    def coefficients(self, wanted: Tensor) -> Tensor:
        """T·Qᵀ, (d_out, r) float32, of wanted (d_out, n_samples), without making Q where it has not been made."""
        if "basis" in vars(self):
            return wanted @ self.basis.T
        if self.condition is None or self.condition > LARGEST_CONDITION:
            moment = wanted.double() @ self.rows.T
        else:
            moment = torch.cat([wanted @ self.inputs.values.T, wanted.sum(1, keepdim=True)], dim=1).double()
        return (moment @ self.coordinates.T).float()


@dataclass(frozen=True)
class Linear:
    """A fitted layer, as coefficients (d_out, r) float32 in the basis Q with those coordinates in its input."""

    coefficients: Tensor
    coordinates: Tensor
    inputs: Units
    outputs: Units

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """(d_out, d_in) and (d_out, 1) float32, with the units that are not kept: W = T·pinv([Z; 1])."""
        found = self.outputs.spread((self.coefficients.double() @ self.coordinates).float(), dim=0)
        return self.inputs.spread(found[:, :-1], dim=1), found[:, -1:]


class LeastSquares:
    """The fit of one net. A column is a sample, and the last target is the labels, not the last layer's own state."""

    def __init__(self, states: Sequence[Tensor], labels: Tensor) -> None:
        """states: the trained outputs of layers 1…K−1, after ReLU, each (d_l, n_samples). labels: (d_K, n_samples).

        All are taken in single precision. Raises `CheckpointError` where the samples differ in number, or a value is
        not finite.
        """
        self._num_samples = labels.shape[-1]
        names = [f"the trained states of layer {layer}" for layer in range(1, len(states) + 1)]
        self._targets = [self._kept(target, name) for target, name in zip(states, names, strict=True)]
        labels = self._checked(labels, "the labels")
        self._targets.append(States(labels, Units(None, len(labels))))
        self._labels = labels
        self._power = float(labels.square().sum(dtype=torch.float64))

    def start(self, inputs: Tensor) -> States:
        """Z_0, (d_0, n_samples), as `paths.peel` takes it."""
        return self._kept(inputs, "the inputs")

    def prepare(self, inputs: States) -> Factor:
        """Factorise Z."""
        values = inputs.values
        extended = values.new_ones(len(values) + 1, self._num_samples, dtype=torch.float64)
        extended[:-1] = values
        cutoff = max(inputs.units.width + 1, self._num_samples) * RELATIVE_CUTOFF
        coordinates, condition = _coordinates(extended, cutoff)
        return Factor(extended, coordinates, condition, inputs)

    def solve(self, prepared: Factor, layer: int, target: int) -> tuple[States, Linear]:
        """Fit a layer below K to the trained state of layer `target`; its outputs, after ReLU."""
        wanted = self._targets[target - 1]
        coefficients = wanted.values @ prepared.basis.T
        outputs = States((coefficients @ prepared.basis).relu_(), wanted.units)
        return outputs, Linear(coefficients, prepared.coordinates, prepared.units, wanted.units)

    def finish(self, prepared: Factor) -> tuple[float, Linear]:
        """Fit layer K to the labels; the `error` of the net that has come about, and the weights."""
        coefficients = prepared.coefficients(self._labels)
        # The fit is a projection of Y, so that the error is what is missing of Y's norm, and Z_K need not be made.
        left = self._power - float(coefficients.square().sum(dtype=torch.float64))
        error = left / self._num_samples
        if left < LEAST_FRACTION * self._power:
            error = self.error(coefficients @ prepared.basis)
        units = self._targets[-1].units
        return error, Linear(coefficients, prepared.coordinates, prepared.units, units)

    def error(self, outputs: Tensor) -> float:
        """‖Z_l − Y‖²_F / N, summed over the labels, the mean over the samples; outputs: (d_K, n_samples)."""
        return float((outputs - self._labels).square().sum(dtype=torch.float64)) / self._num_samples

    def _kept(self, states: Tensor, name: str) -> States:
        """States without the units that are zero throughout: their weights are zero, before them and behind."""
        states = self._checked(states, name)
        nonzero = (states != 0).any(dim=1)
        if bool(nonzero.all()):
            return States(states, Units(None, len(states)))
        live = nonzero.nonzero()[:, 0]
        return States(states.index_select(0, live), Units(live, len(states)))

    def _checked(self, tensor: Tensor, name: str) -> Tensor:
        if tensor.ndim != 2 or tensor.shape[1] != self._num_samples:
            raise CheckpointError(
                f"{name}: expected a matrix of {self._num_samples} columns, a sample each as in the labels, found the "
                f"shape {tuple(tensor.shape)}; record the same samples for every layer"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name}: expected finite numbers, found inf or nan: training diverged; choose an earlier checkpoint"
            )
        return tensor.detach().float()


def forward(inputs: Tensor, layers: Sequence[Linear]) -> Iterator[Tensor]:
    """The states Z_1 … Z_K that fitted layers give, each (d_l, n_samples), ReLU on all but the last.

    With `LeastSquares.error` of each, the layers of the map [K, …, K] give the per-layer curve of YES-0.
    """
    for depth, layer in enumerate(layers, start=1):
        weight, bias = layer.weight_and_bias()
        inputs = torch.addmm(bias, weight, inputs)
        inputs = inputs.relu() if depth < len(layers) else inputs
        yield inputs


def _coordinates(rows: Tensor, cutoff: float) -> tuple[Tensor, float | None]:
    """Coordinates (r, n) in rows (n, n_samples) of an orthonormal basis of their span, and the rows' condition at most.

    All float64. Singular values up to `cutoff` of the greatest count as none; where there are none such the coordinates
    are a lower triangle, and where there are the condition is None.
    """
    half = len(rows) // 2
    moment = rows.new_empty(len(rows), len(rows))
    # It is symmetric: a quarter of the products need not be made.
    torch.mm(rows[:half], rows.T, out=moment[:half])
    torch.mm(rows[half:], rows[half:].T, out=moment[half:, half:])
    moment[half:, :half] = moment[:half, half:].T
    nonzero = moment.diagonal() != 0
    if not bool(nonzero.all()):
        # Rows that ReLU left all zero would make it singular, and that is slow; without them it seldom is.
        live = nonzero.nonzero()[:, 0]
        found, _ = _coordinates(rows.index_select(0, live), cutoff)
        return found.new_zeros(len(found), len(rows)).index_copy_(1, live, found), None
    inverse, condition = _inverse_factor(moment, cutoff)
    if inverse is not None:
        return inverse, condition
    values, vectors = torch.linalg.eigh(moment)
    cut = int((values <= cutoff**2 * values[-1]).sum())
    return (vectors[:, cut:] / values[cut:].sqrt()).T, None


def _inverse_factor(moment: Tensor, cutoff: float) -> tuple[Tensor | None, float]:
    """L⁻¹ of G = L·Lᵀ where it is certain that no singular value of L is up to `cutoff` of the greatest, else None.

    And L's condition at most.

    It costs a fifth of the eigenvectors that it takes to cut.
    """
    lower, failed = torch.linalg.cholesky_ex(moment)
    # The least singular value is no greater than any pivot, the greatest no less than any row's norm.
    if failed or lower.diagonal().min() <= cutoff * moment.diagonal().max().sqrt():
        return None, math.inf
    inverse = torch.linalg.solve_triangular(lower, _identity(len(lower), lower.device), upper=False)
    # Frobenius norms are upper bounds of the spectral ones.
    condition = float(torch.linalg.matrix_norm(lower) * torch.linalg.matrix_norm(inverse))
    return (inverse if condition < 1.0 / cutoff else None), condition


@lru_cache(maxsize=16)
def _identity(size: int, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=torch.float64, device=device)
