"""Checkpoints that other tools wrote: what stands before the names, lies in two shards, is empty or was not merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build_model, opened
from safetensors.torch import load_file, save_file

from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.skeleton import Rehearsal, build_skeleton, rehearse
from peelcli.checkpoint.weights import open_weights
from peelcli.errors import CheckpointError
from peelcli.stages.inspection import open_and_scan
from peelcli.stages.workspace import Workspace

State = dict[str, torch.Tensor]
HOOK = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def ckpt(save_model: Callable[..., Path]) -> Path:
    return save_model("llama", tie_word_embeddings=False)


def state_of(directory: Path) -> State:
    return load_file(directory / "model.safetensors")


def put(directory: Path, state: State, name: str = "model.safetensors") -> None:
    save_file(
        {k: v.contiguous().clone() for k, v in state.items()}, directory / name, metadata={"format": "pt"}
    )


def set_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rehearsed(directory: Path) -> Rehearsal:
    files = open_checkpoint(directory)
    _, skeleton, _ = build_skeleton(files)
    return rehearse(files, skeleton)


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        rehearsed(directory)
    return str(caught.value)


def read_down(directory: Path, tmp_path: Path) -> torch.Tensor:
    weights = open_weights(directory, dtype=torch.float32, offload_dir=tmp_path / "off")
    return weights.read(2)["mlp.down_proj.weight"]


PREFIXES = ["base_model.model.", "policy.", "module.", "module.module.", "_orig_mod.module.", "a.b.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_foreign_prefix_is_named_and_stripped(prefix: str, ckpt: Path, tmp_path: Path) -> None:
    state = state_of(ckpt)
    put(ckpt, {prefix + name: value for name, value in state.items()})
    fit = rehearsed(ckpt)
    (finding,) = fit.findings
    assert finding.kind == "foreign-prefix"
    assert repr(prefix.removeprefix("_orig_mod.")) in finding.message
    assert torch.equal(read_down(ckpt, tmp_path), state[HOOK])
    assert list((tmp_path / "off").iterdir()) == []


@pytest.mark.parametrize("change", ["doubled", "missing"])
def test_the_base_prefix_may_be_doubled_or_missing(change: str, ckpt: Path, tmp_path: Path) -> None:
    state = state_of(ckpt)
    for_all = {"doubled": lambda n: f"model.{n}", "missing": lambda n: n.removeprefix("model.")}[change]
    put(ckpt, {for_all(name): value for name, value in state.items()})
    rehearsed(ckpt)
    assert torch.equal(read_down(ckpt, tmp_path), state[HOOK])


def test_wrappers_between_the_names_are_no_prefix(ckpt: Path, tmp_path: Path) -> None:
    state = state_of(ckpt)
    put(ckpt, {name.replace(".mlp.", "._orig_mod.mlp."): value for name, value in state.items()})
    assert rehearsed(ckpt).findings == ()
    assert torch.equal(read_down(ckpt, tmp_path), state[HOOK])


def test_a_prefix_is_not_stripped_where_something_is_left_over(ckpt: Path) -> None:
    state = {f"policy.{name}": value for name, value in state_of(ckpt).items()}
    put(ckpt, {**state, "value.head.weight": torch.zeros(1, 32)})
    message = refusal(ckpt)
    assert "'policy.'" in message
    assert "'value.head.weight'" in message
    assert "save_pretrained" in message


def test_an_adapter_that_was_not_merged_is_refused_with_the_way_to_merge_it(ckpt: Path) -> None:
    put(ckpt, {**state_of(ckpt), "model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(4, 32)})
    assert "merge_and_unload" in refusal(ckpt)


def test_empty_tensors_name_the_tool_that_gathers_them(ckpt: Path) -> None:
    state = state_of(ckpt)
    put(ckpt, {**state, HOOK: torch.empty(0)})
    assert "zero_to_fp32.py" in refusal(ckpt)
    put(ckpt, {name: torch.empty(0) if value.ndim == 2 else value for name, value in state.items()})
    assert "zero_to_fp32.py" in refusal(ckpt)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", HOOK])
def test_a_shape_that_does_not_fit_is_named_with_both_shapes(name: str, ckpt: Path) -> None:
    state = state_of(ckpt)
    found, wanted = list(state[name][:-1].shape), list(state[name].shape)
    put(ckpt, {**state, name: state[name][:-1]})
    message = refusal(ckpt)
    assert f"{name!r} has shape {found}, and config.json calls for {wanted}" in message
    assert "above report" not in message


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_index_decides_where_a_tensor_lies_in_two_shards(suffix: str, ckpt: Path, tmp_path: Path) -> None:
    """In whatever order the shards are read: one overlaid tensor in a block, one outside, either shard on top."""
    state = state_of(ckpt)
    (ckpt / "model.safetensors").unlink()
    both = (HOOK, "model.norm.weight")
    shards = {f"a{suffix}": state, f"b{suffix}": {name: state[name] * 2 for name in both}}
    for name, tensors in shards.items():
        put(ckpt, tensors, name) if suffix == ".safetensors" else torch.save(tensors, ckpt / name)
    index = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
    for block, norm in (("a", "b"), ("b", "a")):
        weight_map = dict.fromkeys(state, f"a{suffix}") | {both[0]: block + suffix, both[1]: norm + suffix}
        (ckpt / index).write_text(
            json.dumps({"weight_map": weight_map})
        )  # without metadata, as some tools write it
        model = opened(ckpt, tmp_path / block)
        assert torch.equal(model.read_weights(2)["mlp.down_proj.weight"], state[HOOK] * (1 + (block == "b")))
        assert torch.equal(
            dict(model.model.named_parameters())[both[1]], state[both[1]] * (1 + (norm == "b"))
        )
        (finding,) = open_checkpoint(ckpt).findings
        assert finding.kind == "overlaid-tensors"


def scan_kinds(directory: Path, home: Path) -> list[str]:
    steps = open_and_scan(directory, Workspace(home, directory))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return [finding.kind for finding in end.value.scan.findings]


def test_a_buffer_that_is_no_weight_may_hold_infinity(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model("gpt2")
    state = state_of(directory)
    beside = {
        "transformer.h.0.attn.masked_bias": torch.tensor(-torch.inf),
        "transformer.h.0.attn.bias": torch.full((1, 1, 8, 8), -torch.inf),
        "transformer.h.1.rotary.inv_freq": torch.full((2, 2), torch.inf),
    }
    put(directory, {**state, **beside})
    assert scan_kinds(directory, tmp_path / "first") == []
    name = "transformer.h.1.mlp.c_fc.weight"
    put(directory, {**state, **beside, name: torch.full_like(state[name], torch.inf)})
    assert scan_kinds(directory, tmp_path / "second") == ["non-finite"]


def test_the_root_of_a_hub_cache_entry_is_its_snapshot(tmp_path: Path) -> None:
    entry = tmp_path / "models--org--name"
    for commit in ("abc", "def"):
        build_model("llama", seed=ord(commit[0])).save_pretrained(entry / "snapshots" / commit)
    with pytest.raises(CheckpointError, match=r"2 snapshots \(abc, def\).*no refs/main"):
        open_checkpoint(entry)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("def\n")
    files = open_checkpoint(entry)
    assert files.directory == entry / "snapshots" / "def"
    assert [(f.kind, "def" in f.message) for f in files.findings] == [("hub-snapshot", True)]
    (entry / "refs" / "main").write_text("../../elsewhere")
    with pytest.raises(CheckpointError, match="not among them"):
        open_checkpoint(entry)
    shutil.rmtree(entry / "snapshots" / "def")
    assert open_checkpoint(entry).directory.name == "abc"


ATTENTION = [
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "kernels-community/flash-attn",
    {"": "x"},
]


@pytest.mark.parametrize("kind", ATTENTION)
def test_an_attention_that_the_machine_lacks_is_replaced(kind: object, ckpt: Path, tmp_path: Path) -> None:
    for key in ("_attn_implementation", "attn_implementation"):
        set_config(ckpt, **{key: kind})
        config, _, _ = build_skeleton(open_checkpoint(ckpt))
        assert config._attn_implementation in (None, "sdpa")
        assert opened(ckpt, tmp_path / key).config._attn_implementation != kind
