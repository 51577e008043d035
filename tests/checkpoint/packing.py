"""Packed checkpoints made on the spot, each with the plain weights that it stands for, worked out apart from peel."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import build_model, logits, opened
from safetensors.torch import save_file
from torch import Tensor

from peelcli.checkpoint.model import BlockwiseModel

Parts = dict[str, Tensor]  # what stands behind the module's name → tensor
Pack = Callable[
    [Tensor, torch.Generator], tuple[Parts, Tensor]
]  # a weight → its parts, and what they stand for


@dataclass(frozen=True)
class Made:
    """A packed checkpoint, and a model of transformers' that holds the weights that it stands for."""

    directory: Path
    plain: torch.nn.Module


def make(
    directory: Path, pack: Pack, settings: Mapping[str, Any] | None, family: str = "llama", **more: Any
) -> Made:
    """A tiny model whose linear maps in the blocks are packed by `pack`; settings: its quantization_config."""
    model = build_model(family, tie_word_embeddings=False, **more)
    model.save_pretrained(directory)
    generator, stored = torch.Generator().manual_seed(7), {}
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    for name, value in model.state_dict().items():
        if ".layers." in name and value.ndim == 2:
            parts, plain[name] = pack(value, generator)
            stored |= {f"{name.removesuffix('.weight')}.{part}": t.contiguous() for part, t in parts.items()}
        else:
            stored[name] = value.clone()
    write(directory, stored, settings)
    model.load_state_dict(plain)
    return Made(directory, model)


def write(directory: Path, tensors: Parts, settings: Mapping[str, Any] | None, **metadata: str) -> None:
    """Replace the weights, and what config.json says of them."""
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt", **metadata})
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)
    if settings is not None:
        config["quantization_config"] = dict(settings)
    (directory / "config.json").write_text(json.dumps(config))


IDS = torch.arange(24).view(2, 12) * 7 % 97


def require_same(made: Made, offload: Path) -> BlockwiseModel:
    """Assert that peel runs the packed checkpoint as transformers runs the plain one."""
    model = opened(made.directory, offload)
    with torch.no_grad():
        expected = made.plain(IDS).logits
    torch.testing.assert_close(logits(model, IDS), expected, atol=2e-4, rtol=1e-4)
    return model


@torch.no_grad()
def reference_logits(directory: Path) -> Tensor:
    """As transformers' own quantised classes run the checkpoint, without compiling anything."""
    with torch.compiler.set_stance("force_eager"):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return model(IDS).logits


def to_words(codes: Tensor, num_bits: int) -> Tensor:
    """Codes (n, count) → int32 words (n, n_words): one long number a row, lowest bit first."""
    rows = []
    for row in codes.tolist():
        number = sum(int(code) << (num_bits * place) for place, code in enumerate(row))
        count = -(-num_bits * len(row) // 32)
        words = [number >> (32 * i) & 0xFFFFFFFF for i in range(count)]
        rows.append([w - 2**32 if w >= 2**31 else w for w in words])
    return torch.tensor(rows, dtype=torch.int32)


def draw(shape: tuple[int, int], below: int, generator: torch.Generator) -> Tensor:
    """Random codes from 0 up."""
    return torch.randint(0, below, shape, generator=generator)


def steps(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random steps."""
    return 0.02 + 0.05 * torch.rand(shape, generator=generator)
