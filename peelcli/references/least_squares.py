"""The fit of fully connected ReLU nets: each layer by least squares with a bias, then ReLU (arXiv 2410.10984).

W = T·pinv([Z; 1]), in single precision with pinv's default cutoff: singular values of [Z; 1] up to (its larger
dimension) × 2⁻²³ of the greatest count as none. The cutoff is part of the method; with that of double precision the
errors of deep paths change by per cents.

Here an orthonormal basis Q of [Z; 1]'s rows, in which a fit is T·Qᵀ, is reached through the second moment
[Z; 1][Z; 1]ᵀ, several times cheaper than a singular value decomposition. Squaring halves the digits, so that this part
is in double precision: the squared cutoff, 2⁻⁴⁶ and up, lies far above the rounding of its eigenvalues, 2⁻⁵².
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peelcli.errors import CheckpointError

# Of singular values, times the larger dimension: what torch.linalg.pinv does in single precision.
RELATIVE_CUTOFF = 2.0**-23
# Below this fraction of ‖Y‖², ‖Y‖² − ‖fitted‖² has lost too many digits: the error is read from the outputs instead.
LEAST_FRACTION = 1e-2


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

    basis: Tensor  # Q, (r, n_samples) float32: orthonormal rows that span those of [Z; 1]
    coordinates: Tensor  # of Q in [Z; 1], (r, d + 1) float64
    units: Units  # of Z


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
        basis, coordinates = _orthonormal(extended, cutoff)
        return Factor(basis.float(), coordinates, inputs.units)

    def solve(self, prepared: Factor, layer: int, target: int) -> tuple[States, Linear]:
        """Fit a layer below K to the trained state of layer `target`; its outputs, after ReLU."""
        wanted = self._targets[target - 1]
        coefficients = wanted.values @ prepared.basis.T
        outputs = States((coefficients @ prepared.basis).relu_(), wanted.units)
        return outputs, Linear(coefficients, prepared.coordinates, prepared.units, wanted.units)

    def finish(self, prepared: Factor) -> tuple[float, Linear]:
        """Fit layer K to the labels; the `error` of the net that has come about, and the weights."""
        coefficients = self._labels @ prepared.basis.T
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


def _orthonormal(rows: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (r, n_samples) of the span of rows (n, n_samples), and its coordinates (r, n) in them.

    All float64. Singular values up to `cutoff` of the greatest count as none.
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
        basis, found = _orthonormal(rows.index_select(0, live), cutoff)
        return basis, found.new_zeros(len(found), len(rows)).index_copy_(1, live, found)
    inverse = _inverse_factor(moment, cutoff)
    if inverse is not None:
        basis = torch.empty_like(rows)
        torch.mm(inverse[:half, :half], rows[:half], out=basis[:half])  # the rest of these rows is zero
        torch.mm(inverse[half:], rows, out=basis[half:])
        return basis, inverse
    values, vectors = torch.linalg.eigh(moment)
    cut = int((values <= cutoff**2 * values[-1]).sum())
    coordinates = (vectors[:, cut:] / values[cut:].sqrt()).T
    return coordinates @ rows, coordinates


def _inverse_factor(moment: Tensor, cutoff: float) -> Tensor | None:
    """L⁻¹ of G = L·Lᵀ where it is certain that no singular value of L is up to `cutoff` of the greatest, else None.

    It costs a fifth of the eigenvectors that it takes to cut.
    """
    lower, failed = torch.linalg.cholesky_ex(moment)
    # The least singular value is no greater than any pivot, the greatest no less than any row's norm.
    if failed or lower.diagonal().min() <= cutoff * moment.diagonal().max().sqrt():
        return None
    one = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, one, upper=False)
    # Frobenius norms are upper bounds of the spectral ones.
    condition = torch.linalg.matrix_norm(lower) * torch.linalg.matrix_norm(inverse)
    return inverse if condition < 1.0 / cutoff else None
