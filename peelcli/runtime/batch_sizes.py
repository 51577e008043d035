"""Batch sizes: what fits a processor's cache, or keeps an accelerator busy."""

from __future__ import annotations

import torch


def is_accelerator(device: torch.device) -> bool:
    """Whether the device has memory of its own, so that copies to and from it are slow."""
    return device.type != "cpu"


def block_batch(seq_len: int, device: torch.device) -> int:
    """Number of sequences that go through a block at once.

    On a processor about a thousand tokens, whose activations stay in the cache; on an accelerator sixteen times as
    many: with fewer it waits to be told what to do next.
    """
    return max(1, (2**14 if is_accelerator(device) else 1024) // seq_len)


def head_batch(seq_len: int, vocab_size: int, device: torch.device) -> int:
    """Number of sequences whose float32 logits are in memory at once, with as much for a few operations on them.

    On a processor about 8 MB. More is slower (64 MB take three times as long): the allocator asks the system for such
    tensors anew each time. On an accelerator 1 GB.
    """
    return max(1, (2**28 if is_accelerator(device) else 2**21) // max(1, seq_len * vocab_size))


def fit_batch(device: torch.device, *, closely: bool = False) -> int:
    """Sequences per step of a fit to states. On an accelerator a step's time depends on the number of weights.

    closely: whether noise in the gradient is worth twice the time.
    """
    return 16 if is_accelerator(device) else 8 if closely else 4


def free_memory(device: torch.device) -> int:
    """Free bytes on an accelerator; 0 if it does not say."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached
