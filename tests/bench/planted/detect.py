"""The detectors, on the same checkpoint: one number a layer each, higher = more suspicious once oriented."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoders import blocks_of, loss_on
from torch import nn
from transformers.pytorch_utils import Conv1D

from planted.cases import BASES, Case
from planted.plant import checkpoint_of, held_out_ids, held_out_text, load
from planted.truth import loss_without

PEER_TOKENS = 8192
PEERS = ("drop cost", "gradient norm", "alpha", "warnings", "GPTQ error")
GPTQ_BITS, GPTQ_TOKENS = 4, 4096


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
    from peelcli.stages.audit import run_audit
    from peelcli.stages.workspace import Workspace

    steps = run_audit(directory, extract, fit, Workspace(home, directory))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            if end.value.activations is not None:
                end.value.activations.unlink()
            return Path(end.value.fit)


def detected(case: Case, shared: Path, cache: Path, known: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """What the peers say that are not `known` yet: detector → one number a layer.

    GPTQ is llm-compressor's; where that is not installed its column is missing.
    """
    recipe = BASES[case.base].recipe
    model = load(checkpoint_of(case, shared, cache))
    ids = held_out_ids(recipe, shared, cache, PEER_TOKENS)
    layers = range(1, recipe.num_layers + 1)
    found: dict[str, tuple[float, ...]] = {}
    if "drop cost" not in known:
        loss = loss_on(model, ids.flatten(), recipe.seq_len)
        drops = [loss_without(model, layer, "block", ids.flatten(), recipe) - loss for layer in layers]
        found["drop cost"] = tuple(drops)
    if "gradient norm" not in known:
        found["gradient norm"] = _gradient_norms(model, ids)
    if not {"alpha", "warnings"} <= set(known):
        found |= _weight_watcher(model)
    if "GPTQ error" not in known and importlib.util.find_spec("llmcompressor"):
        found["GPTQ error"] = _gptq_errors(model, ids.flatten()[:GPTQ_TOKENS].view(-1, recipe.seq_len))
    return found


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


def _weight_watcher(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """WeightWatcher of a block's matrices: the mean exponent of their spectra's tails, and how many it warns of."""
    import weightwatcher

    watcher = weightwatcher.WeightWatcher(model=model)
    details = watcher.analyze(min_evals=10, plot=False)
    blocks = set(blocks_of(model))
    names = [name for name, module in model.named_modules() if module in blocks]
    alphas, warnings = [], []
    for name in names:
        mine = details[[str(longname).startswith(f"{name}.") for longname in details["longname"]]]
        alphas.append(float(np.nanmean(mine["alpha"])) if len(mine) else float("nan"))
        warnings.append(float(sum(bool(str(w).strip()) for w in mine["warning"])))
    return {"alpha": tuple(alphas), "warnings": tuple(warnings)}


@torch.no_grad()
def _gptq_errors(model: nn.Module, ids: torch.Tensor) -> tuple[float, ...]:
    """The share of what a block's matrices give that GPTQ loses in 4 bits a channel, the mean over them.

    Of each matrix alone, on the inputs that the trained model gives it.
    """
    from solver_peer import gptq, watch

    sums: dict[str, torch.Tensor] = {}
    matrices = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    hooks = watch(matrices, lambda n, x: sums.__setitem__(n, sums.get(n, 0.0) + x.T @ x))
    for part in ids.split(8):
        model(input_ids=part)
    for hook in hooks:
        hook.remove()
    found = []
    for block in blocks_of(model):
        errors, inside = [], set(block.modules())
        for name, m in matrices.items():
            if m in inside:
                weight = (m.weight.T if isinstance(m, Conv1D) else m.weight).contiguous()
                lost = gptq(weight, sums[name] / len(ids), str(GPTQ_BITS), None) - weight
                errors.append(float(_power(lost, sums[name]) / _power(weight, sums[name])))
        found.append(float(np.mean(errors)))
    return tuple(found)


def _power(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Σ ‖weight x‖² over the inputs whose Σ x xᵀ is `gram`."""
    return ((weight @ gram) * weight).sum()


def verdicts_of(fit: Path, peers: Mapping[str, tuple[float, ...]]) -> Detected:
    """What peel and the peers say of one checkpoint."""
    from peelcli.storage.fit_reader import read_fit
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
