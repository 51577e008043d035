"""What is known of a checkpoint and its calibration before anything is fitted: the `about` of every file of peel's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peelcli.calibration import Calibration
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.scan import ScanResult
from peelcli.checkpoint.training_step import training_step
from peelcli.precision import PLAIN, Precision
from peelcli.quant.fake_quantize import dequantize, quantize
from peelcli.quant.grid import Grid, recognise_grid
from peelcli.quant.initial_scale import initial_scale
from peelcli.quant.schemes import SCHEMES
from peelcli.records import Finding, Quantized
from peelcli.scoring.losses import unigram_ce


@dataclass(frozen=True)
class LayerGrids:
    """In how many bits one layer runs, and the grids that references in its own class keep to."""

    bits: float  # per weight, the mean over its matrices
    own: tuple[str, int | None] | None  # the scheme (and group size) of all its matrices, if they share one
    matrices: dict[str, tuple[str, int | None] | None]
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
    matrices: dict[str, tuple[str, int | None] | None] = {}
    for matrix in model.matrices(layer):
        value: Tensor = weights[matrix.name]
        value = value.transpose(-1, -2) if matrix.transposed else value
        grid: Grid | None
        if matrix.name in known:
            said = known[matrix.name]
            grid = Grid(said.scheme, said.group_size, said.num_bits)
        else:
            grid = recognise_grid(value.reshape(-1, value.shape[-1]))
        found.append((value.numel(), grid))
        if grid is not None:
            matrices[matrix.name] = (grid.scheme, grid.group_size) if _holds(grid, value) else None
    total = sum(n for n, _ in found) or 1
    bits = sum(n * (grid.num_bits if grid else stored_bits) for n, grid in found) / total
    grids = {(_in_class(g), g.group_size, g.num_bits) if g else None for _, g in found}
    only = grids.pop() if len(grids) == 1 else None
    # The mean of equal bits may miss them by a rounding, and they are compared with those of schemes.
    return LayerGrids(only[2], only[:2], matrices) if only else LayerGrids(bits, None, matrices)


def _in_class(grid: Grid) -> str:
    """The scheme that a fit in the layer's own class lies in: its own, or the richest of no more bits."""
    if grid.scheme in SCHEMES:
        return grid.scheme
    lighter = [s for s in SCHEMES.values() if s.num_bits <= grid.num_bits]
    return max(lighter, key=lambda scheme: scheme.num_bits).name


def _holds(grid: Grid, weight: Tensor) -> bool:
    """Whether the scheme, with one step a channel or group, has every value: zero points and codebooks are not ours."""
    if grid.scheme not in SCHEMES or SCHEMES[grid.scheme].is_free:
        return False
    scheme, rows = SCHEMES[grid.scheme], weight.float()
    scale = initial_scale(rows, scheme, grid.group_size)
    error = dequantize(quantize(rows, scale, scheme, grid.group_size), scale, scheme, grid.group_size) - rows
    return float(error.abs().max()) <= 0.01 * float(scale.max())


def describe(
    directory: Path,
    model: BlockwiseModel,
    calibration: Calibration,
    *,
    scan: ScanResult,
    layers: tuple[int, ...],
    stored_bits: float,
    seed: int,
    precision: Precision = PLAIN,
) -> dict[str, Any]:
    """Everything a report needs of the checkpoint and the tokens, as JSON values."""
    split = calibration.split
    grids, sizes, travel = [], [], []
    for layer in range(1, model.num_layers + 1):
        weights = model.read_weights(layer)
        grids.append(layer_grid(model, layer, stored_bits, weights))
        sizes.append(weight_rms(model, layer, weights))
        travel.append(vector_travel(model, layer, weights))
        del weights  # one block's at a time
    skipped = list(calibration.notes)
    without = [n for n in layers if not model.sublayers(n)]
    if without:
        skipped.append(
            f"attention and MLP of layers {without}: not told apart in this family; audited as whole blocks"
        )
    return {
        "checkpoint": str(directory),
        "checkpoint_id": scan.checkpoint_id,
        "num_layers": model.num_layers,
        "layers": list(layers),
        "seed": seed,
        "tokens": dict(calibration.tokens),
        "rows": {part: len(getattr(split, part)) for part in ("fit", "select", "eval")},
        "seq_len": calibration.seq_len,
        "data": calibration.description,
        "data_hash": calibration.content_hash,
        "vocab_size": model.vocab_size,
        "unigram_ce": unigram_ce(split.fit, split.eval, model.vocab_size),
        "step": training_step(directory),
        "family": model.family,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "weight_rms": sizes,
        "vector_travel": travel,
        "layer_bits": [g.bits for g in grids],
        "layer_grids": [list(g.own) if g.own else None for g in grids],
        "matrix_grids": [{n: list(g) if g else None for n, g in grid.matrices.items()} for grid in grids],
        "quantized": _quantized(model, precision),
        "layer_hashes": {str(n): h for n, h in scan.layer_hashes.items()},
        "findings": [asdict(f) for f in (*scan.findings, *calibration.findings, *_unused(model))],
        "skipped": skipped,
    }


def _unused(model: BlockwiseModel) -> list[Finding]:
    """Tensors that lie in the files and that the model, as transformers builds it, has no use for."""
    names = model.unused_tensors
    if not names:
        return []
    count = "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"
    shown = ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
    message = (
        f"{count} in the files took no part, because {model.family} has no place for them: {shown}. If they belong "
        "to the network, config.json describes another than was trained, and the figures are that other's"
    )
    return [Finding("unused-tensors", message)]


def _quantized(model: BlockwiseModel, precision: Precision) -> dict[str, Any] | None:
    """What runs in few bits; every block has been read by now."""
    if precision.is_plain:
        return None
    bits = precision.activations.num_bits if precision.activations else None
    return asdict(Quantized(precision.method, model.all_quantized(), bits, precision.notes))
