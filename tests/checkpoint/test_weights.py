"""A checkpoint that is only read gives the same blocks as one that is opened to be run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, build_model

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.weights import block_shapes, open_weights
from peelcli.errors import CheckpointError


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_is_as_in_the_model_that_runs(
    family: str, dtype: torch.dtype, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model(family, shard="20KB")
    model = BlockwiseModel(directory, dtype=dtype, device="cpu", offload_dir=tmp_path / "off")
    weights = open_weights(directory, dtype=dtype, offload_dir=tmp_path / "other")
    shapes = block_shapes(directory)
    for layer in range(1, model.num_layers + 1):
        expected, read = model.read_weights(layer), weights.read(layer)
        assert read.keys() == expected.keys() == shapes[layer - 1].keys() == set(weights.names(layer))
        for name, value in read.items():
            assert torch.equal(value, expected[name]), name
            assert value.dtype == dtype
            assert value.shape == shapes[layer - 1][name]


def test_pickles_are_read_too(tmp_path: Path) -> None:
    plain = build_model("llama")
    plain.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({f"module.{k}": v for k, v in plain.state_dict().items()}, tmp_path / "pytorch_model.bin")
    weights = open_weights(tmp_path, dtype=torch.float32, offload_dir=tmp_path / "off")
    for name, value in plain.model.layers[1].state_dict().items():
        assert torch.equal(weights.read(2)[name], value)


def test_a_shape_that_config_does_not_call_for_is_an_error(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model()
    config = directory / "config.json"
    config.write_text(
        config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40'), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match="config.json"):
        open_weights(directory, dtype=torch.float32, offload_dir=tmp_path / "off").read(1)
