"""Tiny real models of many families, built on the spot."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers
from torch import Tensor

from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.stages.precision import precision_of

# Before anything imports Triton: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests run side by side: one thread each, here and in the commands that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

T = TypeVar("T")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

_SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_GATED = {
    **_SMALL,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {**_GATED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_GATED, "sliding_window": 8}),
    "qwen3": ("Qwen3Config", _GATED),
    "gemma2": ("Gemma2Config", {**_GATED, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**_GATED, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2Config", {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {**_SMALL, "intermediate_size": 48, "max_position_embeddings": 64}),
    "opt": ("OPTConfig", {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "phi": ("PhiConfig", {**_SMALL, "intermediate_size": 48, "max_position_embeddings": 64}),
    "bloom": ("BloomConfig", {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mixtral": ("MixtralConfig", {**_GATED, "num_local_experts": 2, "num_experts_per_tok": 2}),
}


def build_model(family: str, seed: int = 0, **overrides: object) -> torch.nn.Module:
    """A small random model in eval mode whose blocks do something visible (weights larger than at initialisation)."""
    name, settings = FAMILIES[family]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, name)(**{**special, **settings, "initializer_range": 0.2, **overrides})
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def driven(steps: Generator[Any, None, T]) -> T:
    """What the steps end with."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def opened(directory: Path, offload: Path, **trained: Any) -> BlockwiseModel:
    """The checkpoint as peel runs it."""
    precision = precision_of(open_checkpoint(directory), **trained)
    return BlockwiseModel(
        directory, dtype=torch.float32, device="cpu", offload_dir=offload, running=precision.running
    )


@torch.no_grad()
def logits(model: BlockwiseModel, ids: Tensor) -> Tensor:
    """Block by block, as every stage runs it."""
    hidden = model.prepare(ids).hidden
    for layer in range(1, model.num_layers + 1):
        with model.block(layer) as module:
            hidden = model.run_block(layer, module, hidden, ids)
    return model.logits(hidden, ids)


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Build and save a tiny model; returns its directory."""

    def save(family: str = "llama", seed: int = 0, shard: str = "5GB", **overrides: object) -> Path:
        directory = tmp_path / f"{family}-{seed}"
        build_model(family, seed, **overrides).save_pretrained(directory, max_shard_size=shard)
        return directory

    return save


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights and texts beside the checkout; its tests are skipped where it is missing."""
    if not (SHARED / "stories260K-hf" / "model.safetensors").exists():
        pytest.skip("needs ../shared/data beside the checkout")
    return SHARED
