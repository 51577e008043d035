"""Families of many kinds run as transformers runs them, or are refused in words before anything is written."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
import torch
from families import Found, build, cases, found

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.cli.main import run
from peelcli.fitting.block import ModelBlock

RIGHT = {
    "deepseek_v32 narrow heads": "a sparse mask that is left out under another name of the attention",
    "afmoe narrow heads": "an attention whose output is viewed",
    "bamba hybrid": "blocks that return a tuple",
    "openai-gpt": "blocks that return a list",
    "rwkv": "blocks that return three values",
    "gemma4 head_dim by layer": "an attribute that cannot be read off the whole config",
    "cpmant": "a prompt before the tokens",
    "deepseek_v4": "several streams of hidden states",
}
REFUSED = {
    "gemma4 shared keys and values": "block 3 cannot run on the hidden states alone",
    "zaya": "block 2 by itself gives other states",
    "hy_v4 shared indexers": "block 3 cannot run on the hidden states alone",
    "xlm": "what goes into block 2 is not what came out of block 1",
}


def tried(name: str, work: Path) -> Found:
    kind, settings = cases()[name]
    return found(name, kind, settings, work)


@pytest.mark.parametrize("name", RIGHT)
def test_a_family_runs_block_by_block_as_in_a_plain_forward_pass(name: str, tmp_path: Path) -> None:
    row = tried(name, tmp_path)
    assert row.status == "right", str(row)


@pytest.mark.parametrize("name", REFUSED)
def test_blocks_that_share_more_than_the_hidden_states_are_refused(name: str, tmp_path: Path) -> None:
    row = tried(name, tmp_path)
    assert row.status == "refused", str(row)
    assert REFUSED[name] in row.detail


def test_a_family_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    kind, settings = cases()["gemma4 shared keys and values"]
    build(kind, settings).save_pretrained(tmp_path / "ckpt")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(5, 120, size=(60, 32)))
    sizes = ["--seq-len", "32", "--eval-tokens", "256", "--fit-tokens", "256", "--select-tokens", "256"]
    out = tmp_path / "out" / "acts.h5"
    code = run(
        [
            "extract",
            str(tmp_path / "ckpt"),
            "--data",
            str(tmp_path / "ids.npy"),
            *sizes,
            "--threads",
            "1",
            "-o",
            str(out),
        ]
    )
    assert code == 3
    assert "block 3 cannot run on the hidden states alone" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.h5*"))


def test_a_matrix_whose_output_is_added_to_in_place_can_be_fitted(tmp_path: Path) -> None:
    """Llama 4 adds the experts to what the shared expert's last matrix gave, in place."""
    kind, settings = cases()["llama4 every layer a mixture"]
    build(kind, settings).save_pretrained(tmp_path / "ckpt")
    model = BlockwiseModel(tmp_path / "ckpt", dtype=torch.float32, device="cpu", offload_dir=tmp_path / "off")
    ids = torch.randint(5, 120, (2, 24), generator=torch.Generator().manual_seed(0))
    hidden = model.prepare(ids).hidden
    with model.block(1) as module:
        block = ModelBlock(model, 1, module)
        with torch.no_grad():
            out = block(hidden, ids, {})
        targets = out + torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        entered, change, _ = block.pull(
            hidden, ids, targets, {}, "feed_forward.shared_expert.down_proj.weight"
        )
    assert entered.shape == (48, 64)
    # It gives to the residual stream alone, so its output lacks what the block's output lacks.
    torch.testing.assert_close(change, (targets - out).flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_the_table_of_families_is_true() -> None:
    rows = families.survey([])
    assert not [str(row) for row in rows if row.status in ("wrong", "crash")]
    assert families.table(rows) == families.DOCUMENT.read_text(encoding="utf-8")
