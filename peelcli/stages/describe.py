"""What is known of a checkpoint and its calibration before anything is fitted: the `about` of every file of peel's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from peelcli.calibration import Calibration
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.scan import ScanResult
from peelcli.checkpoint.training_step import training_step
from peelcli.fitting.layer_weights import layer_grid, vector_travel, weight_rms
from peelcli.records import Finding, Quantized
from peelcli.scoring.losses import unigram_ce
from peelcli.stages.precision import PLAIN, Precision


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
        "layer_grids": [list(g.own.grid) if g.own else None for g in grids],
        "matrix_grids": [
            {n: list(g.grid) if g else None for n, g in grid.matrices.items()} for grid in grids
        ],
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
