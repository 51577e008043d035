"""What each layer's weights are before anything is fitted: bits and grids, norms, distance from the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.quant.fake_quantize import dequantize, quantize
from peelcli.quant.grid import Grid, recognise_grid
from peelcli.quant.initial_scale import initial_scale
from peelcli.quant.schemes import SCHEMES
from peelcli.records.quant_spec import QuantSpec


@dataclass(frozen=True)
class LayerGrids:
    """In how many bits one layer runs, and the grids that references in its own class keep to."""

    bits: float  # per weight, the mean over its matrices
    own: QuantSpec | None  # of all its matrices, if they share one
    matrices: dict[str, QuantSpec | None]
    """Of every matrix on a grid: the scheme whose members its values are; None where no scheme of ours has them all."""


def weight_rms(
    model: BlockwiseModel, layer: int, weights: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """The root mean square of every matrix of a layer: sublayer ("block" for what belongs to none) → name → value."""
    return _by_sublayer(model, layer, {m.name: _rms(weights[m.name]) for m in model.matrices(layer)})


def vector_travel(
    model: BlockwiseModel, layer: int, weights: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """How far every bias and norm of a layer lies from where training starts, in the same form: an RMS of changes."""
    starts = model.initial_vectors(layer).items()
    return _by_sublayer(model, layer, {n: _rms(weights[n].float() - value) for n, value in starts})


def _rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())


def _by_sublayer(
    model: BlockwiseModel, layer: int, values: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    parts = {s.name: tuple(f"{module}." for module in s.modules) for s in model.sublayers(layer)}
    found: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        part = next((part for part, prefixes in parts.items() if name.startswith(prefixes)), "block")
        found.setdefault(part, {})[name] = value
    return found


def layer_grid(
    model: BlockwiseModel, layer: int, stored_bits: float, weights: Mapping[str, Tensor]
) -> LayerGrids:
    """What is known of the grids of one layer, by its files or else by its values. weights: those of the block."""
    known = model.quantized(layer)
    found: list[tuple[int, Grid | None]] = []
    matrices: dict[str, QuantSpec | None] = {}
    for matrix in model.matrices(layer):
        value: Tensor = weights[matrix.name]
        value = value.transpose(-1, -2) if matrix.transposed else value
        grid: Grid | None
        if matrix.name in known:
            said = known[matrix.name]
            grid = Grid(QuantSpec(*said.spec.grid), said.num_bits)
        else:
            grid = recognise_grid(value.reshape(-1, value.shape[-1]))
        found.append((value.numel(), grid))
        if grid is not None:
            matrices[matrix.name] = grid.spec if _holds(grid, value) else None
    total = sum(n for n, _ in found) or 1
    bits = sum(n * (grid.num_bits if grid else stored_bits) for n, grid in found) / total
    grids = {replace(g, spec=_in_class(g)) if g else None for _, g in found}
    only = grids.pop() if len(grids) == 1 else None
    # The mean of equal bits may miss them by a rounding, and they are compared with those of schemes.
    return LayerGrids(only.num_bits, only.spec, matrices) if only else LayerGrids(bits, None, matrices)


def _in_class(grid: Grid) -> QuantSpec:
    """The spec that a fit in the layer's own class has: its own, or the richest scheme of no more bits."""
    if grid.spec.scheme in SCHEMES:
        return grid.spec
    lighter = [s for s in SCHEMES.values() if s.num_bits <= grid.num_bits]
    return replace(grid.spec, scheme=max(lighter, key=lambda scheme: scheme.num_bits).name)


def _holds(grid: Grid, weight: Tensor) -> bool:
    """Whether the scheme, with one step a channel or group, has every value: zero points and codebooks are not ours."""
    spec, rows = grid.spec, weight.float()
    if spec.scheme not in SCHEMES or SCHEMES[spec.scheme].is_free:
        return False
    scale = initial_scale(rows, spec)
    error = dequantize(quantize(rows, scale, spec), scale, spec) - rows
    return float(error.abs().max()) <= 0.01 * float(scale.max())
