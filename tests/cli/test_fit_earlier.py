"""`peel fit --earlier`: older blocks are tried, replayed, grafted, and not lost to a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jsonschema import Draft202012Validator
from tiny import EXTRACT, FIT, Blow, peel, peel_apart, save_ids, save_tiny

from peelcli.report.json_format import report_schema

ROLLBACK = (*FIT, "--references", "identity,rollback")


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of three checkpoints, and token ids beside them."""
    base = tmp_path_factory.mktemp("series")
    save_tiny(base / "step-300", initializer_range=0.05)
    for step in (200, 100):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base / "step-300")
        torch.manual_seed(step)
        for parameter in model.model.layers.parameters():
            parameter.data += (300 - step) / 2000 * torch.randn_like(parameter)
        model.save_pretrained(base / f"step-{step}")
    save_ids(base / "ids.npy")
    return base


@pytest.fixture(scope="module")
def acts(series: Path) -> str:
    done = peel(series, "extract", series / "step-300", "--data", series / "ids.npy", *EXTRACT)
    assert done.code == 0, done.err
    return done.out.strip()


def command(series: Path, acts: str) -> tuple[object, ...]:
    earlier = [arg for step in (100, 200) for arg in ("--earlier", series / f"step-{step}")]
    return ("fit", acts, *ROLLBACK, *earlier)


@pytest.fixture(scope="module")
def undisturbed(series: Path, acts: str) -> Path:
    done = peel(series, *command(series, acts))
    assert done.code == 0, done.err
    assert done.stages >= {"rollback", "score"}
    return Path(done.out.strip())


def reported(home: Path, fit: Path) -> list[dict[str, Any]]:
    done = peel(home, "report", fit, "-f", "json")
    assert done.code in (0, 1), done.err
    Draft202012Validator(report_schema()).validate(json.loads(done.out))
    return done.runs


def test_the_report_says_which_steps_the_blocks_are_from(series: Path, undisturbed: Path) -> None:
    (run,) = reported(series, undisturbed)
    older = [r for r in run["references"] if r["kind"] == "rollback"]
    assert {(r["layer"], r["origin_step"]) for r in older} == {(n, s) for n in (1, 2, 3) for s in (100, 200)}
    assert {r["start"] for r in older} == {"earlier"}
    assert all(r["key"].endswith(r["origin_id"]) for r in older)
    assert {r["origin_id"] for r in run["references"] if r["kind"] != "rollback"} == {None}


@pytest.mark.parametrize("line", ["rollback 0/6", "rollback 3/6", "rollback 6/6", "score 2/4"])
def test_killed_it_goes_on_and_comes_to_the_same_end(
    line: str, series: Path, acts: str, undisturbed: Path, tmp_path: Path
) -> None:
    fit = tmp_path / "fit.h5"
    struck = peel_apart(tmp_path, *command(series, acts), "-o", fit, blow=Blow(line, signal.SIGKILL))
    assert struck.code == -signal.SIGKILL, struck.err
    assert not fit.exists()
    parts = list((tmp_path / "fit.h5.parts").glob("rollback-*.h5"))
    assert len(parts) == (int(line.split()[1][0]) if line.startswith("rollback") else 6)
    done = peel(tmp_path, *command(series, acts), "-o", fit)
    assert done.code == 0, done.err
    assert ("rollback" in done.stages) == (len(parts) < 6)
    assert reported(tmp_path, fit) == reported(series, undisturbed)


def test_a_graft_is_the_older_block(series: Path, undisturbed: Path, tmp_path: Path) -> None:
    (run,) = reported(series, undisturbed)
    (key,) = [r["key"] for r in run["references"] if (r["layer"], r.get("origin_step")) == (2, 100)]
    graft = ("graft", undisturbed, series / "step-300", "--layer", "2", "--reference", key)
    done = peel(series, *graft, "-o", tmp_path / "new", "--threads", "1")
    assert (done.code, done.out) == (0, f"{tmp_path / 'new'}\n"), done.err
    new, older, newest = (
        transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "new", series / "step-100", series / "step-300")
    )
    for name, value in new.items():
        source = older if ".layers.1." in name else newest
        assert torch.equal(value, source[name]), name


@pytest.mark.parametrize(("overrides", "words"), [({"num_hidden_layers": 4}, "has 4 layers")])
def test_another_model_is_refused_by_name(
    overrides: dict[str, Any], words: str, series: Path, acts: str, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", **overrides)
    done = peel(series, "fit", acts, *ROLLBACK, "--earlier", other, "-o", tmp_path / "fit.h5")
    assert (done.code, done.out) == (3, "")
    for part in (str(other), str(series / "step-300"), words, "--references"):
        assert part in done.err
    assert not list(tmp_path.glob("fit.h5*"))


def test_a_checkpoint_that_is_not_there_is_named(series: Path, acts: str, tmp_path: Path) -> None:
    done = peel(series, "fit", acts, *ROLLBACK, "--earlier", tmp_path / "gone")
    assert (done.code, done.out) == (3, "")
    assert str(tmp_path / "gone") in done.err
