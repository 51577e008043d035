"""A real network that one layer wrecks, its repair and its size like the others': the head tells which it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import build_model, driven

from peelcli.config import ExtractConfig, FitConfig
from peelcli.records import AuditResult
from peelcli.stages.audit import run_audit
from peelcli.stages.workspace import Workspace
from peelcli.verdict import Policy, judge


def audited(tmp_path: Path, wrecked: int | None) -> AuditResult:
    """Of a network that reads runs of equal tokens by its tied embeddings alone; one layer writes noise if asked to."""
    model = build_model("llama", num_hidden_layers=4)
    for number, block in enumerate(model.model.layers, start=1):
        for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            weight.data *= 2.0 if number == wrecked else 1e-3
    model.save_pretrained(tmp_path / "checkpoint")
    runs = np.random.default_rng(0).integers(3, 97, 6 * 64 * 2).repeat(8)
    np.save(tmp_path / "ids.npy", runs)
    extract = ExtractConfig(
        data=(tmp_path / "ids.npy",),
        seq_len=16,
        fit_tokens=1024,
        select_tokens=512,
        eval_tokens=1024,
        threads=1,
    )
    settings = FitConfig(
        references=("identity", "challenge"),
        ladder=False,
        paths=("none",),
        challenge_steps=60,
        learning_rate=0.1,
    )
    steps = run_audit(
        tmp_path / "checkpoint", extract, settings, Workspace(tmp_path / "work", tmp_path / "checkpoint")
    )
    return judge(driven(steps).run)


def early_heads(result: AuditResult) -> set[int]:
    """The layers from which on all blocks were left out."""
    found = {s.reference.layer for s in result.run.scores if s.reference.target > s.reference.layer}
    assert all(s.reference.target == 4 for s in result.run.scores if s.reference.target > s.reference.layer)
    return found


def test_a_sound_network_is_not_read_at_every_depth(tmp_path: Path) -> None:
    assert early_heads(audited(tmp_path, None)) == {1}


@pytest.mark.parametrize("wrecked", [1, 3])
def test_the_head_tells_which_layer_is_wrecked(tmp_path: Path, wrecked: int) -> None:
    result = audited(tmp_path, wrecked)
    assert early_heads(result) == {1, 2, 3}
    assert (result.network.flags, result.flagged) == (("damaged",), (wrecked,))
    # Without what its repair and its size tell.
    result = judge(result.run, Policy(wreck_lead=1e6, wreck_size=1e6))
    assert result.flagged == (wrecked,)
    assert any("reads the text worse" in note for note in result.layers[wrecked - 1].notes)
