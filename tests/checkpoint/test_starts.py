"""Where training starts: what a family gives its biases and norms, and how far a checkpoint's lie from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.fitting.layer_weights import vector_travel


def opened(directory: Path, work: Path) -> BlockwiseModel:
    return BlockwiseModel(directory, dtype=torch.float32, device="cpu", offload_dir=work / "off")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_was_never_trained_has_not_moved_at_all(
    family: str, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = opened(save_model(family), tmp_path)
    found = vector_travel(model, 2, model.read_weights(2))
    names = {name for part in found.values() for name in part}
    assert names == {name for name, value in model.read_weights(2).items() if value.ndim == 1}
    assert all(value == 0.0 for part in found.values() for value in part.values())


@pytest.mark.parametrize(
    ("family", "vector", "part"),
    [
        ("gpt2", "mlp.c_fc.bias", "mlp"),
        ("gpt2", "attn.c_proj.bias", "attention"),
        ("gpt2", "ln_1.weight", "block"),
        ("gemma2", "input_layernorm.weight", "block"),
    ],
)
def test_what_has_moved_is_told_by_how_far(
    family: str, vector: str, part: str, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = opened(save_model(family), tmp_path)
    weights = model.read_weights(2)
    weights[vector] = weights[vector] + 0.25
    found = vector_travel(model, 2, weights)
    assert found[part][vector] == pytest.approx(0.25)
    assert sum(value > 0 for values in found.values() for value in values.values()) == 1
