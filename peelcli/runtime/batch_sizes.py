"""How much goes through a network at once: what a processor's cache holds, or what keeps an accelerator busy."""

from __future__ import annotations

import torch


def is_accelerator(device: torch.device) -> bool:
    """Whether tensors there have memory of their own, which copies to and from the processor's are slow beside."""
    return device.type != "cpu"


def block_batch(seq_len: int, device: torch.device) -> int:
    """Sequences that go through a block at once.

    On a processor about a thousand tokens, whose activations stay in the cache; on an accelerator sixteen times as
    many: with fewer it waits to be told what to do next.
    """
    return max(1, (2**14 if is_accelerator(device) else 1024) // seq_len)


def head_batch(seq_len: int, vocab_size: int, device: torch.device) -> int:
    """Sequences whose logits are held at once, in float32, and as much for each of a few steps over them.

    On a processor about 8 MB. More is slower (64 MB take three times as long): the allocator asks the system for such
    tensors anew each time. On an accelerator 1 GB.
    """
    return max(1, (2**28 if is_accelerator(device) else 2**21) // max(1, seq_len * vocab_size))


def fit_batch(device: torch.device, *, closely: bool = False) -> int:
    """Sequences a step of a fit to states: a step on an accelerator is as long as its weights are many.

    closely: whether noise in the gradient is worth twice the time.
    """
    return 16 if is_accelerator(device) else 8 if closely else 4


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on an accelerator; 0 where it does not say."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached
