"""The blockwise model is the model: its sweep equals the plain forward pass, for every family."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, build_model

from peelcli.checkpoint.block import same_weights, silence
from peelcli.checkpoint.model import BlockwiseModel

WITHOUT_SUBLAYERS = {"bloom"}  # adds the residual inside its attention and MLP modules


def _sweep(model: BlockwiseModel, ids: torch.Tensor) -> list[torch.Tensor]:
    states = [model.prepare(ids).hidden]
    for layer in range(1, model.num_layers + 1):
        with model.block(layer) as module:
            states.append(model.run_block(layer, module, states[-1], ids))
    return states


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sweep_equals_plain_forward(family: str, tmp_path: Path) -> None:
    plain = build_model(family)
    plain.save_pretrained(tmp_path / "ckpt", max_shard_size="20KB")
    model = BlockwiseModel(tmp_path / "ckpt", dtype=torch.float32, device="cpu", offload_dir=tmp_path / "off")
    ids = torch.randint(3, 97, (3, 24), generator=torch.Generator().manual_seed(1))
    expected = plain(input_ids=ids, output_hidden_states=True, use_cache=False)
    states = _sweep(model, ids)
    for layer, state in enumerate(states[:-1]):  # transformers norms the last one
        torch.testing.assert_close(state, expected.hidden_states[layer], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.logits(states[-1], ids), expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sublayers_by_structure(family: str, tmp_path: Path) -> None:
    build_model(family).save_pretrained(tmp_path / "ckpt")
    model = BlockwiseModel(tmp_path / "ckpt", dtype=torch.float32, device="cpu", offload_dir=tmp_path / "off")
    found = {s.name for s in model.sublayers(2)}
    assert found == (set() if family in WITHOUT_SUBLAYERS else {"attention", "mlp"})
    if found:
        ids = torch.arange(16).view(1, 16)
        hidden = model.prepare(ids).hidden
        with model.block(2) as module:
            whole = model.run_block(2, module, hidden, ids)
            for part in found:
                assert not torch.allclose(
                    model.run_block(2, module, hidden, ids, dropped=(part,)), whole, atol=1e-4
                )
            assert torch.allclose(
                model.run_block(2, module, hidden, ids, dropped=tuple(found)), hidden, atol=1e-5
            )
    names = [m.name for m in model.matrices(2)]
    assert names
    assert all("norm" not in n for n in names)


def test_blocks_leave_memory(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path / "ckpt")
    model = BlockwiseModel(tmp_path / "ckpt", dtype=torch.float32, device="cpu", offload_dir=tmp_path / "off")
    with model.block(2) as module:
        assert all(p.device.type == "cpu" for p in module.parameters())
    assert all(p.device.type == "meta" for p in module.parameters())


def test_pickled_and_prefixed_checkpoints_open(tmp_path: Path) -> None:
    plain = build_model("llama")
    for name, prefix in (("bin", ""), ("compiled", "_orig_mod.")):
        plain.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        state = {prefix + key: value for key, value in plain.state_dict().items()}
        torch.save(state, tmp_path / name / "pytorch_model.bin")
        model = BlockwiseModel(
            tmp_path / name, dtype=torch.float32, device="cpu", offload_dir=tmp_path / f"{name}-off"
        )
        read = model.read_weights(2)["self_attn.q_proj.weight"]
        assert torch.equal(read, plain.state_dict()["model.layers.1.self_attn.q_proj.weight"])


@torch.no_grad()
def test_threads_do_not_see_what_others_ask_for(tmp_path: Path) -> None:
    """Logits of other states and heads, and blocks that run meanwhile: each thread has what it would have alone."""
    build_model("llama").save_pretrained(tmp_path / "ckpt")
    model = BlockwiseModel(tmp_path / "ckpt", dtype=torch.float32, device="cpu", offload_dir=tmp_path / "off")
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    hidden = model.prepare(ids).hidden
    width = model.head_width
    heads = [None, *(torch.randn(width, width, generator=torch.Generator().manual_seed(n)) for n in range(7))]
    with model.block(1) as module:

        def work(n: int) -> tuple[torch.Tensor, torch.Tensor]:
            silent = same_weights(module)
            silence(silent, model.sublayers(1)[n % 2])
            moved = model.run_block(1, silent, hidden, ids)
            return moved, model.logits(moved * (n + 1), ids, heads[n % 8])

        alone = [work(n) for n in range(16)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(torch.no_grad()(work), range(16)))
        untouched = model.run_block(1, module, hidden, ids)
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])
    assert not torch.equal(untouched, alone[0][0])
