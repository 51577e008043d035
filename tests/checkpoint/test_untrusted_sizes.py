"""Small files that ask for endless memory or time are refused, and what transformers raises over a file names it."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import opened
from transformers import LlamaConfig

from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.library import over_files
from peelcli.checkpoint.skeleton import build_skeleton, rehearse
from peelcli.checkpoint.training_step import training_step
from peelcli.errors import CheckpointError, PeelError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from fuzzing import checkpoints as fuzzing  # noqa: E402  # a folder of benchmarks is no package


def set_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def build(directory: Path) -> None:
    files = open_checkpoint(directory)
    _, skeleton, _ = build_skeleton(files)
    rehearse(files, skeleton)


HUGE = [
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 10**7),
    ("num_hidden_layers", 1000),
    ("head_dim", 10**9),
    ("head_dim", 10**5),
    ("vocab_size", 10**9),
    ("intermediate_size", 10**8),
    ("hidden_size", 60_000),
    ("num_attention_heads", 10**8),
    ("num_local_experts", 10**7),
    ("max_position_embeddings", 10**30),
    ("sub_config", {"num_layers": 10**8}),
]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize(("key", "value"), HUGE)
def test_sizes_that_the_files_cannot_fill_are_refused_at_once(
    family: str, key: str, value: object, save_model: Callable[..., Path]
) -> None:
    directory = save_model(family)
    build(directory)
    if key == "num_local_experts" and family == "llama":
        pytest.skip("has no experts")
    set_config(directory, **{key: value})
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build(directory)
    assert time.monotonic() - began < 10


def test_a_mask_of_all_positions_is_bounded_too(save_model: Callable[..., Path]) -> None:
    """GPT-2 keeps a buffer of positions², which nothing in the files fills."""
    directory = save_model("gpt_neox")
    set_config(directory, max_position_embeddings=10**7)
    build(directory)  # rotary positions cost nothing
    directory = save_model("gpt2")
    set_config(directory, n_positions=10**6)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build(directory)


def test_labels_are_no_part_of_a_language_model(save_model: Callable[..., Path]) -> None:
    directory = save_model("llama")
    set_config(directory, num_labels=10**8, id2label={"x": 7}, torch_dtype="nonsense", fusion_config=7)
    build(directory)


HOW_IT_IS_RUN = {
    "return_dict": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "use_cache": True,
    "torchscript": True,
    "temperature": -5,
}


def test_how_the_model_was_run_does_not_change_the_figures(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model("llama")
    ids = torch.arange(32).view(2, 16)

    def loss(name: str) -> torch.Tensor:
        model = opened(directory, tmp_path / name)
        return model.logits(model.prepare(ids).hidden, ids)

    plain = loss("plain")
    set_config(directory, **HOW_IT_IS_RUN)
    (directory / "generation_config.json").write_text("[7]")
    assert torch.equal(loss("changed"), plain)


@pytest.mark.parametrize("depth", [34, 60])
def test_a_nested_key_of_a_pickle_is_not_unfolded(depth: int, save_model: Callable[..., Path]) -> None:
    directory = save_model("llama")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(fuzzing.nested_key(depth))
    with pytest.raises(CheckpointError, match="tuple of tuples"):
        open_checkpoint(directory)


def test_a_mistake_of_ours_is_not_blamed_on_the_files() -> None:
    where = Path("x/config.json")
    with (
        pytest.raises(
            CheckpointError, match=r"x/config\.json: transformers cannot build it \(\w+Error: .+\. Correct"
        ),
        over_files(where, "build it", "Correct it."),
    ):
        LlamaConfig(num_hidden_layers="x")
    with pytest.raises(TypeError), over_files(where, "build it", "Correct it."):
        open_checkpoint(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", fuzzing.MUTATORS)
def test_damaged_checkpoints_end_in_words(kind: str, save_model: Callable[..., Path], tmp_path: Path) -> None:
    """A slice of the fuzzer: opened and built, or refused; any other exception fails the test."""
    source = save_model("llama")
    for seed in range(1 if kind == "many tensors" else 12):
        target = tmp_path / f"mutant-{seed}"
        fuzzing.MUTATORS[kind](random.Random(f"{kind} {seed}"), source, target)
        with contextlib.suppress(PeelError):
            build(target)
            training_step(target)
