"""Random checkpoints and token files for the benchmarks; runs in a child process, since it imports torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 1000


def save_llama(
    directory: Path, num_layers: int, *, width: int = 512, dtype: torch.dtype = torch.float32
) -> None:
    """A random Llama of `num_layers` layers, 3.2 million parameters each at width 512."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)


def save_tokens(path: Path, num_tokens: int, vocab_size: int = VOCAB_SIZE) -> None:
    """Random token ids, which need no tokenizer."""
    ids = np.random.default_rng(0).integers(0, vocab_size, num_tokens)
    np.save(path, ids.astype(np.int32))
