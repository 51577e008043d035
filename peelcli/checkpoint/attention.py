"""Attention of heads too narrow for the processor: zeros that fill a vector register, and only what the mask leaves.

torch's kernel on x86 works on 16 numbers at once. On heads of 8 it takes 1.3 to 1.7 times as long as on 16
(measured forwards and backwards, on sequences of 128 to 256 tokens); heads of 12 or more gain nothing by zeros, which
change no product: the result is what it was, to rounding. Nor does that kernel leave out, of up to 512 tokens, what a
causal mask hides: a quarter of the queries at a time, with the keys up to its end, takes three quarters of the time.
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
_NARROW = 12  # heads below are widened
_PIECES, _LEAST_PIECE = 4, 32  # of the queries, and tokens of one
_NOT_PLAIN = ("is_causal", "position_bias", "cache", "sliding_window")  # more than a causal mask may be meant
_MARK = "_peel_widens_narrow_heads"


class _Switch(threading.local):
    """Whether this thread widens heads."""

    on = True


_switch = _Switch()


def widen_narrow_heads(model: nn.Module, device: str) -> None:
    """Let a model that uses torch's attention on a CPU widen its narrow heads as it runs.

    The attention keeps its name, "sdpa": families ask for it, and leave out their sparse mask under any other. So the
    function under that name changes; it does what it did for every module that is not marked as one of this model.
    """
    if device != "cpu":
        return
    AttentionInterface.register("sdpa", _attention)
    for module in model.modules():
        setattr(module, _MARK, True)  # a copy of the module keeps it


@contextlib.contextmanager
def unwidened() -> Iterator[None]:
    """For the length of the context, this thread runs every attention as transformers does."""
    _switch.on = False
    try:
        yield
    finally:
        _switch.on = True


def _attention(module: nn.Module, query: Tensor, *args: Any, **more: Any) -> tuple[Tensor, None]:
    """Attention under the name "sdpa": widened where the heads are narrow and the module is marked."""
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
    """As transformers' `sdpa_attention_forward`, which it calls; (n_seq, n_heads, seq_len, head_dim) each."""
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
    # (n_seq, seq_len, n_heads, head_dim); whole in memory, as what it replaces is: some families view it.
    return torch.cat(found, dim=1)[..., :width].contiguous(), None


@lru_cache(maxsize=32)  # a few lengths, in pieces
def _causal_mask(start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores (stop − start, stop) of queries from `start` on: −∞ where a key comes later."""
    return torch.full((stop - start, stop), -torch.inf, dtype=dtype).triu(start + 1)
