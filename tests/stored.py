"""A small fit and a small extraction, written as a fit and an extraction are, without a model."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peelcli.records import FitOutcome, Reference, Run, Score
from peelcli.storage.activations import ActivationWriter
from peelcli.storage.fit_writer import write_fit

N_SEQ, SEQ_LEN, D_MODEL, VOCAB, LAYERS = 32, 8, 4, 97, 4
TERNARY = 1.584962500721156
HARMFUL = "identity-002-block"  # the reference that flags layer 2


def flagged_run(**changes: Any) -> Run:
    """Four layers; without the second the loss is a third of a nat lower, so that a report flags it."""
    rng = np.random.default_rng(0)
    nll = 2.0 + 0.1 * rng.standard_normal(N_SEQ)
    scores = []
    for layer in range(1, LAYERS + 1):
        for reference, cost in (
            (Reference("identity", layer, layer), -0.33 if layer == 2 else 0.9),
            (Reference("direct", layer, layer, None, "ternary", None, TERNARY), 0.2),
        ):
            worse = tuple((nll + cost * (1 + 0.1 * rng.standard_normal(N_SEQ))).tolist())
            scores.append(
                Score(reference, FitOutcome("none", 0, True, ""), worse, worse, (abs(cost),) * N_SEQ)
            )
    losses = tuple(nll.tolist())
    tokens = dict.fromkeys(("fit", "select", "eval"), N_SEQ * SEQ_LEN)
    run = Run(
        "run/checkpoint-1", "id0", LAYERS, tuple(range(1, LAYERS + 1)), 0, tokens, SEQ_LEN, "text", VOCAB,
        data_hash="a", scheme="ternary", nll_select=losses, nll_eval=losses, entropy_eval=losses, unigram_ce=4.0,
        layer_bits=(16.0,) * LAYERS, family="Llama", dtype="float32", device="cpu", granularity="channel",
        scores=tuple(scores), config={"key": "k"},
    )  # fmt: skip
    return replace(run, **changes)


def save_fit(path: Path, run: Run | None = None) -> Path:
    """The run as `peel fit` writes it."""
    write_fit(path, run or flagged_run(), torch.ones(N_SEQ, SEQ_LEN, dtype=torch.int64), {})
    return path


def save_activations(path: Path) -> Path:
    """An extraction of the same network, as `peel extract` writes it."""
    run = flagged_run()
    left_out = ("scores", "paths", "nll_select", "nll_eval", "entropy_eval", "config")
    about = {f.name: getattr(run, f.name) for f in fields(run) if f.name not in left_out}
    about |= {
        "rows": dict.fromkeys(run.tokens, N_SEQ),
        "layer_grids": [None] * LAYERS,
        "matrix_grids": [{}] * LAYERS,
    }
    about["findings"] = [asdict(f) for f in run.findings]
    ids = np.ones((3 * N_SEQ, SEQ_LEN))
    writer = ActivationWriter(
        path, about=about, config={}, ids=ids, stored=range(LAYERS + 1), d_model=D_MODEL, dtype="float32"
    )
    for layer in range(LAYERS + 1):
        writer.write(layer, 0, torch.full((3 * N_SEQ, SEQ_LEN, D_MODEL), 1.0 + layer))
        writer.finish_layer(layer)
    writer.finish(np.ones(3 * N_SEQ), np.ones(3 * N_SEQ))
    return path
