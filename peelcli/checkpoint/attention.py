"""Faster attention on the CPU for narrow heads: pad them with zeros, and skip keys that the causal mask hides.

torch's x86 kernel works on 16 numbers at once. A head of 8 features takes 1.3 to 1.7 times as long as one of 16
(measured forwards and backwards on sequences of 128 to 256 tokens). Heads of 12 or more features gain nothing from
padding. Zeros change no product, so the result is the same up to rounding.

Up to 512 tokens the kernel also computes the scores that a causal mask hides. Running a quarter of the queries at a
time, with the keys up to the end of that quarter, takes three quarters of the time.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_LANES = 16
_NARROW = 12  # heads with fewer features than this are padded
_PIECES, _LEAST_PIECE = 4, 32  # number of pieces of the queries, and the fewest tokens in a piece
_NOT_PLAIN = (
    "is_causal",
    "position_bias",
    "cache",
    "sliding_window",
)  # with any of these, the mask may not be causal
_MARK = "_peel_widens_narrow_heads"


class _Switch(threading.local):
    """Whether this thread pads narrow heads."""

    on = True


_switch = _Switch()


def widen_narrow_heads(model: nn.Module, device: str) -> None:
    """Make a model on the CPU pad its narrow attention heads when it runs.

    The function registered as "sdpa" is replaced. A new name would not do: some families leave out their sparse mask
    under any other name. Modules of other models are not marked, and for them the function does what it did before.
    """
    if device != "cpu":
        return
    AttentionInterface.register("sdpa", _attention)
    for module in model.modules():
        setattr(module, _MARK, True)  # a copy of the module keeps it


@contextlib.contextmanager
def unwidened() -> Iterator[None]:
    """Within the context, this thread runs attention exactly as transformers does."""
    _switch.on = False
    try:
        yield
    finally:
        _switch.on = True


def _attention(module: nn.Module, query: Tensor, *args: Any, **more: Any) -> tuple[Tensor, None]:
    """The function registered as "sdpa": it pads narrow heads of marked modules, and else calls transformers'."""
    is_narrow = query.shape[-1] < _NARROW and query.device.type == "cpu"
    if is_narrow and _switch.on and getattr(module, _MARK, False):
        return _widened(module, query, *args, **more)
    return sdpa_attention_forward(module, query, *args, **more)


def _widened(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """`sdpa_attention_forward` of transformers on padded heads.

    query, key, value: (n_seq, n_heads, seq_len, head_dim). Returns (n_seq, seq_len, n_heads, head_dim) and None.
    """
    width, num = value.shape[-1], query.shape[-2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (nn.functional.pad(t, (0, -t.shape[-1] % _LANES)) for t in (query, key, value))

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **more)[0]

    is_plain = attention_mask is None and all(more.get(name) is None for name in _NOT_PLAIN)
    if not (is_plain and getattr(module, "is_causal", True) and num == key.shape[-2]):
        return attend(query, key, value, attention_mask)[..., :width].contiguous(), None
    piece = max(_LEAST_PIECE, math.ceil(num / _PIECES))
    found = []
    for start in range(0, num, piece):
        stop = min(start + piece, num)
        mask = _causal_mask(start, stop, query.dtype) if start else None
        found.append(attend(query[..., start:stop, :], key[..., :stop, :], value[..., :stop, :], mask))
    # (n_seq, seq_len, n_heads, head_dim). It must be contiguous, because some families call view() on it.
    return torch.cat(found, dim=1)[..., :width].contiguous(), None


@lru_cache(maxsize=32)  # enough for a few sequence lengths, each in _PIECES pieces
def _causal_mask(start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The mask (stop − start, stop) that is added to the scores of queries `start` to `stop`: −∞ for later keys."""
    return torch.full((stop - start, stop), -torch.inf, dtype=dtype).triu(start + 1)
