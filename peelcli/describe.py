"""What is known of a checkpoint and its calibration before anything is fitted: the `about` of every file of peel's."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from peelcli.calibration import Calibration
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.scan import ScanResult
from peelcli.errors import CheckpointError
from peelcli.quant.grid import Grid, recognise_grid

_STEP = re.compile(r"(?:checkpoint|step|iter|global_step)[-_]?(\d+)$", re.IGNORECASE)


def training_step(directory: Path) -> int | None:
    """The optimiser step of a checkpoint: from trainer_state.json, else from the directory's name, else None."""
    state = directory / "trainer_state.json"
    if state.is_file():
        try:
            step = json.loads(state.read_text(encoding="utf-8")).get("global_step")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{state}: not the JSON object that the Trainer writes ({error}); mend or remove it."
            ) from error
        if isinstance(step, int):
            return step
    match = _STEP.search(directory.resolve().name)
    return int(match.group(1)) if match else None


def layer_grid(
    model: BlockwiseModel, layer: int, stored_bits: float
) -> tuple[float, tuple[str, int | None] | None]:
    """Bits per weight of one layer, and the one grid (scheme, group size) that all its matrices lie on, if they do."""
    weights = model.read_weights(layer)
    found: list[tuple[int, Grid | None]] = []
    for matrix in model.matrices(layer):
        value: Tensor = weights[matrix.name]
        value = value.transpose(-1, -2) if matrix.transposed else value
        found.append((value.numel(), recognise_grid(value.reshape(-1, value.shape[-1]))))
    total = sum(n for n, _ in found) or 1
    bits = sum(n * (grid.num_bits if grid else stored_bits) for n, grid in found) / total
    grids = {(g.scheme, g.group_size, g.num_bits) if g else None for _, g in found}
    only = grids.pop() if len(grids) == 1 else None
    # The mean of equal bits may miss them by a rounding, and they are compared with those of schemes.
    return (only[2], only[:2]) if only else (bits, None)


def unigram_ce(fit: np.ndarray, evaluation: np.ndarray, vocab_size: int) -> float:
    """CE, in nats per token, on `evaluation` of the token frequencies of `fit` (add-one smoothed).

    Never above ln(vocab_size): where `fit` is too short to know the frequencies, not to use them does better.
    """
    counts = np.bincount(fit[:, 1:].ravel(), minlength=vocab_size) + 1.0
    return min(float(-np.log(counts / counts.sum())[evaluation[:, 1:]].mean()), float(np.log(vocab_size)))


def describe(
    directory: Path,
    model: BlockwiseModel,
    calibration: Calibration,
    *,
    scan: ScanResult,
    layers: tuple[int, ...],
    stored_bits: float,
    seed: int,
) -> dict[str, Any]:
    """Everything a report needs of the checkpoint and the tokens, as JSON values."""
    split = calibration.split
    bits, grids = zip(
        *(layer_grid(model, n, stored_bits) for n in range(1, model.num_layers + 1)), strict=True
    )
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
        "layer_bits": list(bits),
        "layer_grids": [list(g) if g else None for g in grids],
        "layer_hashes": {str(n): h for n, h in scan.layer_hashes.items()},
        "findings": [asdict(f) for f in scan.findings],
        "skipped": skipped,
    }
