"""Every sample config audits a checkpoint; only the budgets are cut down here, by flags, which win."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import AUDIT, peel, save_ids, save_tiny

SAMPLES = Path(__file__).resolve().parents[2] / "sample_configs"


@pytest.mark.parametrize("name", sorted(path.name for path in SAMPLES.glob("*.yaml")))
def test_a_sample_config_audits(name: str, tmp_path: Path) -> None:
    checkpoint, ids = save_tiny(tmp_path / "ckpt"), save_ids(tmp_path / "ids.npy")
    done = peel(
        tmp_path,
        "audit",
        checkpoint,
        "-c",
        SAMPLES / name,
        "--data",
        ids,
        *AUDIT,
        "--exit-zero",
        "-f",
        "json",
    )
    assert done.code == 0, done.err
    (run,) = json.loads(done.out)["runs"]
    assert len(run["layers"]) == 3
    scheme = {"binary.yaml": "binary", "four_bits.yaml": "nf4"}.get(name, "ternary")
    assert run["scheme"] == scheme


def test_there_are_samples() -> None:
    assert len(list(SAMPLES.glob("*.yaml"))) >= 6
