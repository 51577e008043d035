"""An audit gives on a GPU, and in bfloat16, what it gives in single precision on a processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_model, driven

from peelcli.config import ExtractConfig, FitConfig
from peelcli.records import Run
from peelcli.stages.audit import run_audit
from peelcli.stages.workspace import Workspace

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def audited(work: Path, device: str, dtype: str) -> Run:
    """The run of a tiny random Llama, references of every kind but `rollback` and peeled paths among them."""
    work.mkdir()
    build_model("llama", 0).save_pretrained(work / "model")
    np.save(work / "ids.npy", np.random.default_rng(0).integers(3, 97, 6000).astype(np.int32))
    where = {"device": device, "dtype": dtype}
    extract = ExtractConfig(
        data=(work / "ids.npy",), seq_len=16, fit_tokens=1024, select_tokens=512, eval_tokens=1024, **where
    )
    fit = FitConfig(direct_steps=4, challenge_steps=4, path_steps=2, head_steps=4, **where)
    space = Workspace(work / "work", work / "model")
    space.make()
    return driven(run_audit(work / "model", extract, fit, space)).run


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cuda", "float32", marks=NEEDS_GPU),
        pytest.param("cuda", "bfloat16", marks=NEEDS_GPU),
        ("cpu", "bfloat16"),
    ],
)
def test_every_device_and_precision_measures_the_same(device: str, dtype: str, tmp_path: Path) -> None:
    known, found = (
        audited(tmp_path / "known", "cpu", "float32"),
        audited(tmp_path / "found", device, dtype),
    )
    np.testing.assert_allclose(found.nll_eval, known.nll_eval, atol=0.05)
    assert found.skipped == known.skipped
    by_key = {score.reference.key: score for score in found.scores}
    assert by_key.keys() == {score.reference.key for score in known.scores}
    for score in known.scores:
        other, reference = by_key[score.reference.key], score.reference
        costs = [
            np.subtract(s.nll_eval, s.beside(run.nll_eval)) for s, run in ((score, known), (other, found))
        ]
        # A last bit sends a code of few bits another way, and on so few tokens that is seen.
        coarse = reference.kind in ("direct", "span") and reference.scheme != "int8"
        assert np.mean(costs[1]) == pytest.approx(np.mean(costs[0]), abs=0.15 if coarse else 0.01)
    assert found.paths is not None
    assert known.paths is not None
    for own, other in zip(found.paths.scores, known.paths.scores, strict=True):
        assert np.mean(own.nll_eval) == pytest.approx(np.mean(other.nll_eval), abs=0.1)
