"""Schemes go through fit, report, verify and graft, and what is grafted has the loss that was reported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from test_commands import loss_of
from tiny import EXTRACT, FIT, peel, save_ids, save_tiny

SETTINGS = {
    "nf4 in groups": ("--scheme", "nf4", "--group-size", "8"),
    "fp8_e4m3": ("--scheme", "fp8_e4m3"),
    "int5": ("--scheme", "int5"),
    "int7 in groups": ("--scheme", "int7", "--group-size", "8"),
}


@dataclass(frozen=True)
class Extracted:
    home: Path
    ckpt: Path
    acts: Path


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Extracted:
    base = tmp_path_factory.mktemp("schemes")
    found = Extracted(base / "home", save_tiny(base / "ckpt"), base / "acts.h5")
    data = save_ids(base / "ids.npy")
    done = peel(found.home, "extract", found.ckpt, "--data", data, "-o", found.acts, *EXTRACT)
    assert done.code == 0, done.err
    return found


def fit(at: Extracted, path: Path, *how: str) -> dict[str, Any]:
    few = ("--references", "identity,direct", "--paths", "none")
    done = peel(at.home, "fit", at.acts, "-o", path, *FIT, *few, *how)
    assert done.code == 0, done.err
    done = peel(at.home, "report", path, "-f", "json", "--exit-zero")
    assert done.code == 0, done.err
    (run,) = done.runs
    return run


@pytest.mark.parametrize("how", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_reference_is_fitted_stored_verified_and_grafted(
    how: tuple[str, ...], extracted: Extracted, tmp_path: Path
) -> None:
    path = tmp_path / "fit.h5"
    run = fit(extracted, path, *how)
    assert run["scheme"] == how[1]
    (reference,) = [r for r in run["references"] if r["key"] == f"direct-002-block-{how[1]}"]
    done = peel(extracted.home, "verify", path, extracted.ckpt, "--layers", "1-3", "--threads", "1")
    assert done.code == 0, done.err
    new = tmp_path / "new"
    command = ("graft", path, extracted.ckpt, "--layer", "2", "--reference", reference["key"])
    done = peel(extracted.home, *command, "-o", new, "--threads", "1")
    assert done.code == 0, done.err
    with h5py.File(path) as file:
        ids = torch.from_numpy(file["ids_eval"][...]).long()
    assert abs(loss_of(new, ids) - (run["network"]["ce"] - reference["gap"])) < 1e-4
