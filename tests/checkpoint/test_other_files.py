"""What lies beside the audited weights is found: nothing that a user could take for them is passed over in silence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build_model
from safetensors.torch import save_file

from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.other_files import other_files
from peelcli.errors import CheckpointError
from peelcli.records import Finding

DAY = 86400
WRITTEN = 1_700_000_000


def write_adapter(directory: Path, base: str | None = "org/base") -> None:
    """An adapter as PEFT saves it."""
    directory.mkdir(exist_ok=True)
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", **({"base_model_name_or_path": base} if base else {})}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def put(directory: Path, *names: str, days: int = 0) -> None:
    """Files that are not looked into, written `days` after the audited weights."""
    for name in names:
        (directory / name).write_bytes(b"x")
        os.utime(directory / name, (WRITTEN + days * DAY,) * 2)


@pytest.fixture
def ckpt(save_model: Callable[..., Path]) -> Path:
    """One file of weights."""
    return settled(save_model())


@pytest.fixture
def shards(save_model: Callable[..., Path]) -> Path:
    """Several shards and their index."""
    return settled(save_model(seed=1, shard="15KB"))


def settled(directory: Path) -> Path:
    for path in directory.iterdir():
        os.utime(path, (WRITTEN, WRITTEN))
    return directory


def found(directory: Path) -> list[Finding]:
    return other_files(open_checkpoint(directory))


def the_only(directory: Path) -> Finding:
    (finding,) = found(directory)
    return finding


def test_a_checkpoint_by_itself_has_no_finding(ckpt: Path, shards: Path) -> None:
    put(ckpt, "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json")
    put(ckpt, "tokenizer.json", "vocab.json", "README.md", "remap.pt", "gemma.txt", days=1)
    assert found(ckpt) == found(shards) == []


def test_an_older_single_file_beside_newer_shards_is_named_and_can_be_moved(
    ckpt: Path, shards: Path, tmp_path: Path
) -> None:
    newer = shutil.copytree(shards, tmp_path / "both")
    for path in newer.glob("model*"):
        os.utime(path, (WRITTEN + 3 * DAY,) * 2)
    shutil.copy2(ckpt / "model.safetensors", newer)
    finding = the_only(newer)
    assert finding.kind == "other-weights"
    assert finding.message.startswith(
        "two sets of weights lie here; audited: model.safetensors, which transformers"
    )
    assert "model-00001-of-000" in finding.message
    assert "written 3 days later" in finding.message
    assert "move model.safetensors to another directory and audit again" in finding.message
    (newer / "model.safetensors").rename(tmp_path / "away")  # as it says
    assert open_checkpoint(newer).files[0].name.startswith("model-00001-of-")
    assert found(newer) == []


def test_a_newer_pickle_beside_shards_is_named_and_can_be_reached(shards: Path, tmp_path: Path) -> None:
    torch.save(build_model("llama", 2).state_dict(), shards / "pytorch_model.bin")
    os.utime(shards / "pytorch_model.bin", (WRITTEN + 3 * 3600,) * 2)
    finding = the_only(shards)
    assert "audited: model.safetensors.index.json" in finding.message
    assert "a single pickle file (pytorch_model.bin), written 3 hours later" in finding.message
    assert "move model.safetensors.index.json to another" in finding.message
    (shards / "model.safetensors.index.json").rename(tmp_path / "away")
    assert [file.name for file in open_checkpoint(shards).files] == ["pytorch_model.bin"]


def test_shards_that_the_index_does_not_name_are_stale(shards: Path) -> None:
    put(shards, "model-00001-of-00099.safetensors", "model-00002-of-00099.safetensors", days=-2)
    finding = the_only(shards)
    assert finding.kind == "stale-shards"
    assert "2 shards lie here that model.safetensors.index.json does not name" in finding.message
    assert "model-00002-of-00099.safetensors), written 2 days earlier" in finding.message


OTHERS = [
    ("pytorch_model.bin", "a single pickle file"),
    ("pytorch_model-00001-of-00002.bin", "pickle shards"),
    (
        "pytorch_model.bin.index.json",
        "pickle shards (pytorch_model.bin.index.json, whose shards are not here)",
    ),
    ("model.safetensors.index.json", "whose shards are not here"),
    ("model.fp16.safetensors", "another variant"),
    ("ema.safetensors", "averaged (EMA) weights"),
    ("pytorch_model_ema.bin", "averaged (EMA) weights"),
    ("consolidated.00.pth", "their makers' own layout"),
    ("consolidated.safetensors", "their makers' own layout"),
    ("model-q4.gguf", "a GGUF file"),
    ("tf_model.h5", "TensorFlow or Flax"),
    ("epoch=1.ckpt", "Lightning"),
    ("__0_0.distcp", "a distributed checkpoint"),
    ("layer_3.safetensors", "other safetensors"),
]


@pytest.mark.parametrize(("name", "what"), OTHERS)
def test_every_other_set_of_weights_is_named(name: str, what: str, ckpt: Path) -> None:
    put(ckpt, name)
    finding = the_only(ckpt)
    assert finding.kind == "other-weights"
    assert what in finding.message
    assert name in finding.message
    assert "written at the same time" in finding.message


def test_an_index_of_the_audited_file_is_no_other_set(ckpt: Path) -> None:
    put(ckpt, "model.safetensors.index.json")
    (ckpt / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    assert found(ckpt) == []


def test_weights_that_the_config_names_are_those_that_were_audited(ckpt: Path) -> None:
    shutil.copy2(ckpt / "model.safetensors", ckpt / "mine.safetensors")
    config = json.loads((ckpt / "config.json").read_text())
    (ckpt / "config.json").write_text(json.dumps({**config, "transformers_weights": "mine.safetensors"}))
    put(ckpt, "model.safetensors", days=1)
    message = the_only(ckpt).message
    assert "audited: mine.safetensors, which config.json names" in message
    assert "take transformers_weights out of config.json" in message


def test_weights_that_vanish_are_no_mistake_of_peel(ckpt: Path) -> None:
    files = open_checkpoint(ckpt)
    put(ckpt, "pytorch_model.bin")
    (ckpt / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="changed or removed while it was audited"):
        other_files(files)


def test_an_adapter_beside_a_model_is_left_out_and_named(ckpt: Path) -> None:
    write_adapter(ckpt)
    finding = the_only(ckpt)
    assert finding.kind == "adapter"
    assert "adapter_model.safetensors: a PEFT 'LORA' adapter of the base model 'org/base'" in finding.message
    assert "was left out" in finding.message
    assert "merge_and_unload().save_pretrained(MERGED)" in finding.message


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_alone_is_refused_with_its_base_and_the_way_to_merge(
    with_config: bool, tmp_path: Path
) -> None:
    write_adapter(tmp_path)
    if with_config:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path)
    message = str(refused.value)
    assert "a PEFT 'LORA' adapter of the base model 'org/base', without that model's weights" in message
    assert f"AutoPeftModelForCausalLM.from_pretrained({str(tmp_path)!r}).merge_and_unload()" in message
    assert "tokenizer" in message
    write_adapter(tmp_path, base=None)
    with pytest.raises(CheckpointError, match=r"base model is not named.*which you have to name"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "{", '{"peft_type": 3, "base_model_name_or_path": []}'])
def test_a_damaged_adapter_config_is_no_error(content: str, ckpt: Path) -> None:
    (ckpt / "adapter_config.json").write_text(content)
    assert the_only(ckpt).kind == "adapter"


def test_own_code_under_a_known_model_type_is_named_as_not_run(ckpt: Path) -> None:
    config = json.loads((ckpt / "config.json").read_text())
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": "mine.Tok"}
    (ckpt / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    finding = the_only(ckpt)
    assert finding.kind == "own-code"
    assert "AutoModelForCausalLM: mine.Model" in finding.message
    assert "mine.Tok" not in finding.message
    assert "was not run" in finding.message
    assert "'llama'" in finding.message
    (ckpt / "config.json").write_text(json.dumps(config))
    put(ckpt, "modeling_mine.py")
    assert "modeling_mine.py lies here" in the_only(ckpt).message
