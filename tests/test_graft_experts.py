"""A mixture whose experts transformers fuses on load: a graft is taken apart again, into the tensors of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import opened
from safetensors.torch import load_file, save_file

from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.graft import require_same_parts, take_apart
from peelcli.checkpoint.layers import group_by_layer
from peelcli.errors import CheckpointError
from peelcli.records import Reference
from peelcli.stages.graft import graft

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 3, "head_dim": 16, "decoder_sparse_step": 1}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 3, "shared_expert_intermediate_size": 16}),
}


def save(directory: Path, family: str, prefix: str = "") -> Path:
    name, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES, **more)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    state = {prefix + key: value for key, value in state.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def blocks_of(directory: Path) -> list[dict[str, torch.Tensor]]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return [dict(block.named_parameters()) for block in model.model.layers]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graft_into_fused_experts_is_read_back_as_it_was_meant(family: str, tmp_path: Path) -> None:
    directory = save(tmp_path / "ckpt", family)
    files, model = open_checkpoint(directory), opened(directory, tmp_path / "off")
    trained = blocks_of(directory)
    graft(Path("none"), files, model, Reference("exchange", 1, 3), tmp_path / "exchanged")
    first, second, third = blocks_of(tmp_path / "exchanged")
    assert equal(first, trained[2])
    assert equal(second, trained[1])
    assert equal(third, trained[0])
    graft(Path("none"), files, model, Reference("identity", 2, 2), tmp_path / "dropped")
    first, second, third = blocks_of(tmp_path / "dropped")
    assert equal(first, trained[0])
    assert equal(third, trained[2])
    experts = [name for name in second if "experts" in name and second[name].ndim == 3]
    assert experts
    assert all(not second[name].any() for name in experts)
    assert open_checkpoint(tmp_path / "dropped").tensors.keys() == files.tensors.keys()


def test_a_graft_keeps_the_names_that_the_files_have(tmp_path: Path) -> None:
    directory = save(tmp_path / "ckpt", "mixtral", "policy.")
    files, model = open_checkpoint(directory), opened(directory, tmp_path / "off")
    graft(Path("none"), files, model, Reference("exchange", 1, 3), tmp_path / "new")
    copy = open_checkpoint(tmp_path / "new")
    assert copy.tensors.keys() == files.tensors.keys()
    other = opened(tmp_path / "new", tmp_path / "other")
    assert equal(other.read_weights(1), model.read_weights(3))
    assert equal(other.read_weights(3), model.read_weights(1))


def test_a_block_that_does_not_come_apart_into_what_was_read_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path / "ckpt", "mixtral")
    files, model = open_checkpoint(directory), opened(directory, tmp_path / "off")
    parts = take_apart(model.model, f"{model.blocks_name}.1.", model.read_weights(2))
    layers, _ = group_by_layer(files)
    names = {relative: info.name for relative, info in layers[2].items()}
    require_same_parts(files, 2, parts, names, torch.float32)
    expert = next(name for name in parts if "experts" in name)
    with pytest.raises(CheckpointError, match="cannot graft into this checkpoint"):
        require_same_parts(files, 2, {**parts, expert: parts[expert] + 1}, names, torch.float32)
