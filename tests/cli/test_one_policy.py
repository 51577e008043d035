"""The margin of a match is one setting of a fit and of its report, wherever it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import driven
from tiny import EXTRACT, ONE_THREAD, TOKENS, peel, save_ids, save_tiny

from peelcli.config import ExtractConfig, FitConfig
from peelcli.records import Run
from peelcli.stages.audit import run_audit
from peelcli.stages.workspace import Workspace
from peelcli.storage.fit_reader import read_fit
from peelcli.verdict import Policy, judge

ONLY = ("--references", "identity", "--paths", "none", "--no-ladder", *ONE_THREAD)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    where = tmp_path_factory.mktemp("one-policy")
    return save_tiny(where / "ckpt"), save_ids(where / "ids.npy")


def settings_of_fit(work: Path) -> list[dict[str, object]]:
    fits = [read_fit(path) for path in sorted(work.rglob("fit-*.h5"))]
    assert all(len(s.nll_eval) == len(run.nll_eval) for run in fits for s in run.scores)
    return [dict(run.config["fit"]) for run in fits]  # type: ignore[call-overload]


@pytest.mark.parametrize("section", ["flag", "report", "fit"])
def test_a_margin_given_anywhere_reaches_the_fit_and_is_kept_in_it(
    checkpoint: tuple[Path, Path], tmp_path: Path, section: str
) -> None:
    ckpt, ids = checkpoint
    given: tuple[object, ...] = ("--matched-margin", "5")
    if section != "flag":
        (tmp_path / "c.yaml").write_text(f"{section}:\n  matched-margin: 5\n", encoding="utf-8")
        given = ("-c", tmp_path / "c.yaml")
    arguments = (ckpt, "--data", ids, *TOKENS, *ONLY, "-o", tmp_path / "work", "-f", "json")
    done = peel(tmp_path, "audit", *arguments, *given)
    assert done.code in (0, 1), done.err
    assert [s["matched_margin"] for s in settings_of_fit(tmp_path / "work")] == [5.0]


def test_two_margins_for_one_audit_are_refused(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    ckpt, ids = checkpoint
    (tmp_path / "c.yaml").write_text(
        "report:\n  matched-margin: 5\nfit:\n  matched-margin: 0.1\n", encoding="utf-8"
    )
    done = peel(tmp_path, "audit", ckpt, "--data", ids, *TOKENS, *ONLY, "-c", tmp_path / "c.yaml")
    assert done.code == 2
    assert "matched_margin: is 5 under 'report:' and 0.1 under 'fit:'" in done.err


def test_fits_under_different_margins_are_judged_by_one_that_is_named(
    checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    ckpt, ids = checkpoint
    acts = tmp_path / "acts.h5"
    assert peel(tmp_path, "extract", ckpt, "--data", ids, *EXTRACT, "-o", acts).code == 0
    fits = [tmp_path / "auto.h5", tmp_path / "five.h5"]
    assert peel(tmp_path, "fit", acts, *ONLY, "-o", fits[0]).code == 0
    assert peel(tmp_path, "fit", acts, *ONLY, "-o", fits[1], "--matched-margin", "5").code == 0
    refused = peel(tmp_path, "report", *fits)
    assert refused.code == 2
    assert "different margins (auto, 5)" in refused.err
    assert peel(tmp_path, "report", *fits, "--matched-margin", "5").code in (0, 1)


def test_an_audit_of_a_trained_model_decides_a_wide_match_on_all_of_eval(
    shared: Path, tmp_path: Path
) -> None:
    source = shared / "stories260K-hf"
    text = (shared / "tinystories.txt",)
    extract = ExtractConfig(
        data=text, fit_tokens=512, select_tokens=1024, eval_tokens=4096, seq_len=128, threads=1
    )
    margin = 1.5

    def run_of(asked: float | None) -> Run:
        fit = FitConfig(
            references=("identity",), ladder=False, paths=("none",), threads=1, matched_margin=asked
        )
        steps = run_audit(source, extract, fit, Workspace(tmp_path / "work", source))
        return driven(steps).run

    screened = run_of(None)
    assert {len(s.nll_eval) for s in screened.scores} == {8, 32}
    later = judge(screened, Policy(matched_margin=margin))
    assert any("of 32 sequences of eval" in v.reason for v in later.layers)
    at_once = judge(run_of(margin))
    assert sum(v.verdict == "matched" for v in at_once.layers) > sum(
        v.verdict == "matched" for v in later.layers
    )
    for result in (later, at_once):
        matched = [v.reference for v in result.layers if v.verdict == "matched" and v.reference]
        assert {len(result.score_of(reference).nll_eval) for reference in matched} == {32}
