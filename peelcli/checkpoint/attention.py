"""Attention of heads too narrow for the processor: as many zeros beside each as fill a vector register.

torch's kernel on x86 works on 16 numbers at once. On heads of 8 it takes 1.3 to 1.7 times as long as on 16
(measured forwards and backwards, on sequences of 128 to 256 tokens); heads of 12 or more gain nothing by zeros, which
change no product: the result is what it was, to rounding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peelcli.checkpoint.structure import head_dim

_NAME = "peel_widened_sdpa"
_LANES = 16
_NARROW = 12  # heads below are widened


def widen_narrow_heads(model: Any, device: str) -> None:
    """Let a model of narrow heads that uses torch's attention on a CPU widen them as it runs."""
    is_sdpa = model.config._attn_implementation == "sdpa"
    if is_sdpa and device == "cpu" and 0 < head_dim(model.config) < _NARROW:
        AttentionInterface.register(_NAME, _widened)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)


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
    width = value.shape[-1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (nn.functional.pad(t, (0, -t.shape[-1] % _LANES)) for t in (query, key, value))
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    return out[..., :width], None
