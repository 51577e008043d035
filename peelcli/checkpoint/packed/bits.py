"""Unpack codes of 1 to 8 bits from 32-bit words, packed without gaps and lowest bit first, as in most formats."""

from __future__ import annotations

import torch
from torch import Tensor

from peelcli.errors import CheckpointError

_CHUNK = 2**22  # bits unpacked at a time; each takes a byte of memory meanwhile


def words_needed(count: int, num_bits: int) -> int:
    """How many words of 32 bits hold `count` codes without gaps."""
    return -(-count * num_bits // 32)


def unpack_rows(words: Tensor, num_bits: int, count: int) -> Tensor:
    """Words int32 (n, n_words) → the first `count` codes of each row, uint8 (n, count), 0 … 2^num_bits − 1.

    Raises CheckpointError if the words are not int32, if num_bits is not 1 to 8, or if there are too few words.
    """
    if (
        words.dtype not in (torch.int32, torch.uint32)
        or words.ndim != 2
        or not words.numel()
        or not 1 <= num_bits <= 8
    ):
        raise CheckpointError(
            f"packed codes of {num_bits} bits in {words.dtype} of shape {list(words.shape)}: expected a matrix of "
            "int32 that holds codes of 1 to 8 bits; save the checkpoint again with the tool that packed it"
        )
    if words.shape[1] < words_needed(count, num_bits):
        raise CheckpointError(
            f"packed codes: {count} of {num_bits} bits need {words_needed(count, num_bits)} words a row, found "
            f"{words.shape[1]}; copy the checkpoint again"
        )
    # Machines that torch runs on are little-endian. Flatten first, because a single column keeps its original strides.
    raw = words.flatten().view(torch.uint8).view(len(words), -1)
    if 8 % num_bits == 0:
        shifts = torch.arange(0, 8, num_bits, dtype=torch.uint8)
        codes: Tensor = (raw.unsqueeze(-1) >> shifts) & (2**num_bits - 1)
        return codes.reshape(len(raw), -1)[:, :count]
    places = torch.arange(8, dtype=torch.uint8)
    weights = 1 << torch.arange(num_bits, dtype=torch.uint8)
    parts = []
    for some in raw.split(max(1, _CHUNK // (8 * raw.shape[1]))):
        bits = ((some.unsqueeze(-1) >> places) & 1).reshape(len(some), -1)[:, : count * num_bits]
        parts.append((bits.reshape(len(some), count, num_bits) * weights).sum(-1, dtype=torch.uint8))
    return torch.cat(parts)
