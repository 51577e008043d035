"""Widened heads give what they gave, forwards and backwards, and only where they are narrow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peelcli.checkpoint import attention
from peelcli.checkpoint.model import BlockwiseModel


def opened(directory: Path, work: Path) -> BlockwiseModel:
    return BlockwiseModel(directory, dtype=torch.float32, device="cpu", offload_dir=work / "off")


@pytest.mark.parametrize("length", [12, 133])  # whole, and in pieces of which the last is shorter
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (2, 1)])
def test_losses_and_gradients_are_those_of_the_plain_attention(
    heads: int,
    kv_heads: int,
    length: int,
    save_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 32 // heads}
    directory = save_model(hidden_size=32, max_position_embeddings=256, **settings)
    widths: set[int] = set()

    def seen(module: object, query: torch.Tensor, *args: Any, **more: Any) -> tuple[torch.Tensor, None]:
        widths.add(query.shape[-1])
        return sdpa_attention_forward(module, query, *args, **more)

    monkeypatch.setattr(attention, "sdpa_attention_forward", seen)
    model = opened(directory, tmp_path)
    assert model.model.config._attn_implementation == "sdpa"  # families ask for it by name
    ids = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(0))
    embedded = model.prepare(ids).hidden.clone().requires_grad_()
    out = embedded
    for layer in range(1, model.num_layers + 1):
        with model.block(layer) as module:
            out = model.run_block(layer, module, out, ids)
    assert widths == {16}  # 8, widened, or 16
    widths.clear()
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert plain.config._attn_implementation == "sdpa"
    reached: list[torch.Tensor] = []
    plain.model.norm.register_forward_pre_hook(lambda _, args: reached.append(args[0]))
    plain(inputs_embeds=embedded, use_cache=False)
    assert widths == {32 // heads}  # another model of this process runs as transformers runs it
    gradients = [torch.autograd.grad(o.square().sum(), embedded)[0] for o in (out, reached[0])]
    for mine, theirs in ((out, reached[0]), gradients):
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()
