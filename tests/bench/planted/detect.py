"""The detectors, on the same checkpoint: one number a layer each, higher = more suspicious once oriented."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoders import blocks_of, loss_on
from torch import nn

from planted.cases import BASES, Case
from planted.plant import checkpoint_of, held_out_ids, held_out_text, load
from planted.truth import loss_without

PEER_TOKENS = 8192
PEERS = ("drop cost", "gradient norm", "alpha")


@dataclass(frozen=True)
class Detected:
    """What was said of the layers of one checkpoint, layer 1 first."""

    verdicts: tuple[str, ...]
    flagged: tuple[int, ...]
    sublayers: tuple[str | None, ...]
    scores: dict[str, tuple[float | None, ...]]  # detector → a number for each layer


def settings_of(text: Path) -> tuple[Any, Any]:
    """Those of `peel audit` but for what says nothing of single layers: the ladder, and the peeled paths."""
    from peelcli.config import ExtractConfig, FitConfig

    return (
        ExtractConfig(data=(text,), seq_len=128, threads=1),
        FitConfig(ladder=False, paths=("none",), threads=1),
    )


def audited(case: Case, shared: Path, cache: Path) -> Path:
    """The fit of a case's checkpoint, made where it is not there."""
    base = BASES[case.base]
    text = shared / base.foreign if case.foreign else held_out_text(base.recipe, shared, cache)
    return audit(checkpoint_of(case, shared, cache), *settings_of(text), cache / "audits" / case.name)


def audit(directory: Path, extract: Any, fit: Any, home: Path) -> Path:
    """The fit that an audit ends with, its files under `home`; the states are let go."""
    from peelcli.audit import audit_steps
    from peelcli.workspace import Workspace

    steps = audit_steps(directory, extract, fit, Workspace(home, directory))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            if end.value.activations is not None:
                end.value.activations.unlink()
            return Path(end.value.fit)


def detected(case: Case, shared: Path, cache: Path) -> dict[str, tuple[float, ...]]:
    """What the peers say: detector → one number a layer."""
    recipe = BASES[case.base].recipe
    model = load(checkpoint_of(case, shared, cache))
    ids = held_out_ids(recipe, shared, cache, PEER_TOKENS)
    loss = loss_on(model, ids.flatten(), recipe.seq_len)
    layers = range(1, recipe.num_layers + 1)
    drops = [loss_without(model, layer, "block", ids.flatten(), recipe) - loss for layer in layers]
    return {
        "drop cost": tuple(drops),
        "gradient norm": _gradient_norms(model, ids),
        "alpha": _alphas(model, recipe.num_layers),
    }


def _gradient_norms(model: nn.Module, ids: torch.Tensor) -> tuple[float, ...]:
    """The norm of the loss's gradient by a block's weights, relative to that of the weights."""
    model.zero_grad()
    for part in ids.split(16):
        (model(input_ids=part, labels=part).loss * len(part) / len(ids)).backward()
    found = []
    for block in blocks_of(model):
        pairs = [(p, p.grad) for p in block.parameters() if p.grad is not None]
        gradient = sum(float(g.square().sum()) for _, g in pairs)
        found.append((gradient / sum(float(p.detach().square().sum()) for p, _ in pairs)) ** 0.5)
    return tuple(found)


def _alphas(model: nn.Module, num_layers: int) -> tuple[float, ...]:
    """WeightWatcher's alpha: the mean over a block's matrices of the exponent of their spectrum's tail."""
    import weightwatcher

    watcher = weightwatcher.WeightWatcher(model=model)
    details = watcher.analyze(min_evals=10, plot=False)
    names = [name for name, module in model.named_modules() if module in set(blocks_of(model))]
    found = []
    for name in names:
        mine = details[[str(longname).startswith(f"{name}.") for longname in details["longname"]]]
        found.append(float(np.nanmean(mine["alpha"])) if len(mine) else float("nan"))
    assert len(found) == num_layers
    return tuple(found)


def verdicts_of(fit: Path, peers: Mapping[str, tuple[float, ...]]) -> Detected:
    """What peel and the peers say of one checkpoint."""
    from peelcli.fitstore import read_fit
    from peelcli.verdict import judge

    run = read_fit(fit)
    result = judge(run)
    fvu = {
        s.reference.layer: s.fit.fvu_eval
        for s in run.scores
        if s.reference.kind == "direct" and s.reference.sublayer is None
    }
    layers = sorted(result.layers, key=lambda v: v.layer)
    return Detected(
        tuple(v.verdict for v in layers),
        result.flagged,
        tuple(v.sublayer for v in layers),
        {
            "peel": tuple(v.score for v in layers),
            "fvu": tuple(fvu.get(v.layer) for v in layers),
            **peers,
        },
    )
