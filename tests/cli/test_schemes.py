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

from peelcli.quant.schemes import SCHEMES
from peelcli.references.plan import default_scheme

SETTINGS = {
    "nf4 in groups": ("--scheme", "nf4", "--group-size", "8"),
    "fp8_e4m3": ("--scheme", "fp8_e4m3"),
    "int5": ("--scheme", "int5"),
    "int7 in groups": ("--scheme", "int7", "--granularity", "group", "--group-size", "8"),
    "int4 with zero points": ("--scheme", "int4", "--no-symmetric", "--group-size", "8"),
    "int3 by the matrix": ("--scheme", "int3", "--granularity", "tensor", "--scale", "absmax"),
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
    expected = "tensor" if "tensor" in how else "group" if "--group-size" in how else "channel"
    assert run["granularity"] == expected
    assert run["symmetric"] == ("--no-symmetric" not in how)
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


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (("--granularity", "tensor", "--group-size", "8"), "give both or neither"),
        (("--granularity", "group"), "give both or neither"),
        (("--scheme", "nf4", "--scale", "absmean"), "choose absmax or mse"),
        (("--no-symmetric",), "zero points belong to int2, int3"),
        (("--no-symmetric", "--scheme", "int4", "--scale", "absmean"), "with absmax or mse"),
    ],
)
def test_settings_that_contradict_each_other_are_wrong_usage(
    how: tuple[str, ...], words: str, extracted: Extracted, tmp_path: Path
) -> None:
    commands = (("fit", extracted.acts), ("audit", extracted.ckpt))
    for command in commands:
        done = peel(extracted.home, *command, *how, "-o", tmp_path / "new")
        assert (done.code, done.out) == (2, "")
        assert words in done.err


def test_references_use_no_more_bits_than_the_layers_have() -> None:
    assert default_scheme([]) == default_scheme([16.0, 16.0]) == "ternary"
    assert default_scheme([16.0, SCHEMES["ternary"].num_bits]) == "ternary"
    assert default_scheme([16.0, 1.0]) == "binary"
