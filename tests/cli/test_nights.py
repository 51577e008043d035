"""Two nights of a run, as a script in CI sees them: the exit code, and the layer by its number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jsonschema import Draft202012Validator
from tiny import ONE_THREAD, Done, peel

from peelcli.report.json_format import report_schema

HEALTHY = Path(__file__).parents[2] / "peelcli" / "demo" / "healthy"  # small, and trained on the default text
NIGHTS = ("first", "alike", "stopped", "frozen", "diverged")
TOKENS = ("--fit-tokens", "256", "--select-tokens", "1024", "--eval-tokens", "2048", "--seq-len", "64")
AUDIT = (*TOKENS, "--references", "identity", "--paths", "none", *ONE_THREAD)


@torch.no_grad()
def night(base: Path, name: str, first: Path) -> None:
    """The first night's weights a little further on, and layer 2 with a fault."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(first)
    torch.manual_seed(len(name))
    for parameter in model.parameters():
        parameter.add_(0.01 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0)
    block = model.model.layers[1]
    if name == "stopped":  # as it is at its initialisation: what it adds is next to nothing
        for parameter in block.parameters():
            parameter.mul_(0.02 if parameter.ndim > 1 else 1)
    elif name == "frozen":
        older: Any = transformers.AutoModelForCausalLM.from_pretrained(first)
        block.load_state_dict(older.model.layers[1].state_dict())
    elif name == "diverged":
        block.mlp.up_proj.weight[0, 0] = float("nan")
    shutil.copytree(first, base / name)
    model.save_pretrained(base / name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nights of one run, audited, and the first as a baseline."""
    base = tmp_path_factory.mktemp("nights")
    first = Path(shutil.copytree(HEALTHY, base / "first"))
    for name in NIGHTS[1:]:
        night(base, name, first)
    for name in NIGHTS:
        done = audited(base, name)
        assert done.code in (0, 1), done.err
    done = audited(base, "first", "--write-baseline", base / "first.json")
    assert f"kept in {base / 'first.json'}" in done.err
    return base


def audited(base: Path, name: str, *more: object) -> Done:
    return peel(base, "audit", base / name, *AUDIT, *more)


def fit_of(base: Path, name: str) -> Path:
    """The fit that the fixture made; tests with other settings make more."""
    return min((base / "peel").glob(f"{name}-*/fit-*.h5"), key=lambda path: path.stat().st_mtime_ns)


ONLY = ("--fail-on", "regressed")


@pytest.mark.parametrize(("name", "code"), [("alike", 0), ("stopped", 1), ("frozen", 1)])
def test_the_second_night_fails_where_a_layer_stopped_learning(name: str, code: int, base: Path) -> None:
    fits = [fit_of(base, n) for n in ("first", name)]
    for done in (
        audited(base, name, "--baseline", base / "first.json", *ONLY),
        peel(base, "report", fits[1], "--baseline", base / "first.json", *ONLY),
        peel(base, "report", *fits, *ONLY),
        peel(base, "audit", base / "first", base / name, *AUDIT, *ONLY),
    ):
        assert done.code == code, done.out + done.err
        row = (
            next(line for line in done.out.splitlines() if line.split()[:3] == ["!", "2", "regressed"])
            if code
            else ""
        )
        assert ("regressed" in row) == bool(code)
        assert ("(layer 2)" in done.out) == bool(code)


def test_a_night_whose_weights_are_not_finite_is_held_against_the_baseline_too(base: Path) -> None:
    done = audited(base, "diverged", "--baseline", base / "first.json", *ONLY)
    assert done.code == 1
    assert "layer 2: regressed: broken now" in " ".join(done.out.split())
    refused = audited(base, "diverged", "--write-baseline", base / "first.json")
    assert refused.code == 2
    assert "nothing was measured" in refused.err


def test_with_a_baseline_what_regressed_fails_whatever_else_does(base: Path) -> None:
    against = ("report", fit_of(base, "frozen"), "--baseline", base / "first.json")
    assert peel(base, *against, "--fail-on", "broken").code == 1
    for settings in (("--fail-on", "none"), ("--exit-zero",)):
        done = peel(base, *against, *settings)
        assert done.code == 0
        assert "regressed" in done.out


def test_a_blessed_baseline_knows_what_stands_still(base: Path, tmp_path: Path) -> None:
    against = ("report", fit_of(base, "frozen"), *ONLY)
    new = tmp_path / "new.json"
    assert peel(base, *against, "--baseline", base / "first.json", "--write-baseline", new).code == 1
    done = peel(base, *against, "--baseline", new)
    assert done.code == 0
    shutil.copyfile(base / "first.json", new)
    before = new.read_bytes()
    peel(base, *against, "--baseline", new)
    assert new.read_bytes() == before  # nothing but --write-baseline writes it


def test_a_missing_layer_fails(base: Path) -> None:
    done = audited(base, "alike", "--layers", "1,3-5", "--baseline", base / "first.json", "-f", "json")
    assert done.code == 1
    report = json.loads(done.out)
    Draft202012Validator(report_schema()).validate(report)
    (run,) = report["runs"]
    assert run["comparison"]["regressed_layers"] == [2]
    assert 2 in run["flagged_layers"]
    assert [c["status"] for c in run["comparison"]["layers"]] == ["same", "missing", "same", "same", "same"]


def test_the_json_has_every_change_with_its_interval(base: Path) -> None:
    fits = [fit_of(base, name) for name in ("first", "alike", "stopped")]
    done = peel(base, "report", *fits, *ONLY, "-f", "json")
    report = json.loads(done.out)
    Draft202012Validator(report_schema()).validate(report)
    assert report["flagged"]
    runs = report["runs"]
    assert [run["comparison"] and run["comparison"]["regressed_layers"] for run in runs] == [None, [], [2]]
    for change in runs[2]["comparison"]["layers"]:
        low, high = change["gap_change_interval"]
        assert low <= change["gap_change"] <= high
    assert runs[2]["comparison"]["ce_change"] == pytest.approx(
        runs[2]["network"]["ce"] - runs[1]["network"]["ce"]
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("--seed", "1"), "What differs: the seed (0 and 1)"),
        (("--seq-len", "16"), "the sequence length (64 and 16)"),
    ],
)
def test_other_tokens_are_refused(settings: tuple[str, ...], words: str, base: Path) -> None:
    done = audited(base, "alike", "--baseline", base / "first.json", *settings)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert "extract" not in done.err  # known before anything is run


def test_another_network_is_refused(base: Path) -> None:
    shutil.copytree(HEALTHY, base / "shallow")
    config = base / "shallow" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 2}))
    done = audited(base, "shallow", "--baseline", base / "first.json")
    assert (done.code, done.out) == (2, "")
    assert "LlamaForCausalLM of 2 layers" in done.err
    assert "--write-baseline" in done.err
    missing = audited(base, "alike", "--baseline", base / "absent.json")
    assert (missing.code, missing.out) == (3, "")


def test_every_audit_is_added_to_the_history_once_and_drawn(base: Path, tmp_path: Path) -> None:
    history = tmp_path / "h.jsonl"
    for name in ("first", "stopped", "first"):
        audited(base, name, "--history", history)
    assert history.read_text().count("\n") == 2
    alone = peel(base, "report", "--history", history)
    assert (alone.code, alone.out.split("\n")[0]) == (1, "History")
    assert "the newest: stopped, layer 2 flagged" in " ".join(alone.out.split())
    assert peel(base, "report", "--history", history, "--exit-zero").code == 0
    both = peel(base, "report", fit_of(base, "first"), "--history", history)
    assert (both.code, "\nHistory\n" in both.out) == (0, True)
    for refused in (
        peel(base, "report"),
        peel(base, "report", "--write-baseline", "x", "--history", history),
    ):
        assert (refused.code, refused.out) == (2, "")
    nothing = peel(base, "report", "--history", tmp_path / "absent")
    assert (nothing.code, nothing.out) == (3, "")
