"""`peel watch`, as it is started, waits, and is stopped."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from tiny import ONE_THREAD, TOKENS, Blow, Done, peel, peel_apart, save_ids, save_tiny

from peelcli.report.json_format import report_schema

SETTINGS = (
    *TOKENS,
    *ONE_THREAD,
    "--references",
    "identity",
    "--paths",
    "none",
    "--every",
    "0.2s",
    "-f",
    "json",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint that is flagged, for it is untrained, one that is not, and token ids."""
    base = tmp_path_factory.mktemp("watch")
    save_tiny(base / "untrained", initializer_range=0.02)
    save_tiny(base / "trained")
    save_ids(base / "ids.npy")
    return base


def watched(base: Path, run: Path, *more: object) -> Done:
    return peel(run.parent, "watch", run, "--data", base / "ids.npy", *SETTINGS, *more)


def reports(done: Done) -> list[dict[str, object]]:
    """The reports on stdout, one after another."""
    found, text = [], done.out
    while text.strip():
        report, end = json.JSONDecoder().raw_decode(text.lstrip())
        Draft202012Validator(report_schema()).validate(report)
        found.append(report)
        text = text.lstrip()[end:]
    return found


def names(done: Done) -> list[str]:
    return [Path(report["runs"][0]["checkpoint"]).name for report in reports(done)]  # type: ignore[index]


def test_once_audits_what_is_there_by_step_and_says_what_is_not_whole(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (100, 90):
        shutil.copytree(base / "trained", run / f"checkpoint-{step}")
    done = watched(base, run, "--once")
    assert (done.code, names(done)) == (0, ["checkpoint-90", "checkpoint-100"])
    assert reports(done)[1]["runs"][0]["comparison"]["step"] == 90  # type: ignore[index]
    shutil.copytree(base / "untrained", run / "checkpoint-110")
    (run / "checkpoint-100" / "model.safetensors").write_bytes(b"cut")
    done = watched(base, run, "--once", "--history", tmp_path / "h.jsonl")
    assert (done.code, names(done)) == (1, ["checkpoint-90", "checkpoint-110"])
    assert "not whole" in done.err
    assert (tmp_path / "h.jsonl").read_text().count("\n") == 2
    assert watched(base, run, "--once", "--exit-zero").code == 0
    absent = watched(base, tmp_path / "absent", "--once")
    assert (absent.code, absent.out) == (3, "")
    assert "no such directory" in absent.err


def test_it_waits_for_what_comes_and_stops_at_the_step(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def save() -> None:
        time.sleep(0.5)
        for step in (10, 20):
            shutil.copytree(base / "trained", run / f"checkpoint-{step}")

    trainer = threading.Thread(target=save)
    trainer.start()
    done = watched(base, run, "--until-step", 20, "--max-idle", "60s")
    trainer.join()
    assert (done.code, names(done)) == (0, ["checkpoint-10", "checkpoint-20"])
    assert "step 20 is reached" in done.err


def test_it_stops_when_nothing_comes_any_more(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = watched(base, tmp_path / "run", "--max-idle", "0.5s")
    assert (done.code, done.out) == (0, "")
    assert "nothing new for 0.5s" in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("kind", "code"), [("untrained", 1), ("trained", 0)])
def test_a_signal_stops_it_and_the_exit_code_says_how_it_came_out(
    kind: str, code: int, number: signal.Signals, base: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(base / kind, run / "checkpoint-1")
    command = ("watch", run, "--data", base / "ids.npy", *SETTINGS)
    done = peel_apart(tmp_path / "home", *command, blow=Blow("kept in", number, 1.0))
    assert (done.code, names(done)) == (code, ["checkpoint-1"]), done.err
    assert "stopped watching" in done.err
    assert "Traceback" not in done.err
    # In the midst of an audit, too; the next watch goes on from there.
    done = peel_apart(tmp_path / "other", *command, blow=Blow("extract 2/5", number))
    assert (done.code, done.out) == (0, "")
    assert not list((tmp_path / "other").rglob("fit-*.h5"))


def test_a_reader_that_has_gone_ends_it(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "untrained", tmp_path / "run" / "checkpoint-1")
    command = ("watch", tmp_path / "run", "--data", base / "ids.npy", *SETTINGS)
    done = peel_apart(tmp_path / "home", *command, closed_pipe=True)
    assert (done.code, done.out) == (1, "")
    assert "Traceback" not in done.err
