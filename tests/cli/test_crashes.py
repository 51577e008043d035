"""Two audits at once, checkpoints that change, damaged leftovers, power cuts: never a wrong figure, and none kept."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashes import CHANGES, Disk, Interrupted, Place, at_once, damage_all, kept
from tiny import Blow, peel, peel_apart

from peelcli.errors import ArtefactError
from peelcli.runtime.locks import Lock
from peelcli.storage.replacement_weights import replacing


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def spoilt(place: Place) -> Iterator[Place]:
    """The same, whose checkpoint may be spoilt: it is good again afterwards."""
    yield place
    place.put_back()


# -- two at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("middle", [None, "score 1/4"])
def test_two_audits_in_one_directory_come_out_as_one_alone(
    middle: str | None, place: Place, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    if middle is not None:
        struck = peel_apart(
            tmp_path / "struck", *place.command("-o", work), blow=Blow(middle, signal.SIGKILL)
        )
        assert struck.code == -signal.SIGKILL
    both = at_once(place, work)
    for done in both:
        assert place.is_as_expected(done), done.err
    waited = [done for done in both if "another peel process" in done.err]
    assert all("--no-wait" in done.err for done in waited)
    assert sorted(path.suffix for path in work.glob("*.*")) == [".h5", ".h5", ".json"]


def test_no_wait_ends_with_3_and_touches_nothing(place: Place, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert place.is_as_expected(place.audit(tmp_path, "-o", work))
    (fit,) = work.glob("fit-*.h5")
    content = fit.read_bytes()
    fit.unlink()
    with Lock(fit) as lock:
        assert lock.take()
        done = place.audit(tmp_path, "-o", work, "--no-wait")
        assert (done.code, done.out) == (3, "")
        assert f"{fit}: another peel process (process {os.getpid()}) is working on this file" in done.err
        fit.write_bytes(content)  # what is whole is read at once
        assert place.is_as_expected(place.audit(tmp_path, "-o", work, "--no-wait"))


def _write(path: Path, begun: object, go_on: object) -> None:
    with replacing(path) as file:
        file["x"] = 1
        begun.set()  # type: ignore[attr-defined]
        go_on.wait(20)  # type: ignore[attr-defined]


def test_a_second_writer_leaves_the_first_ones_file_alone(tmp_path: Path) -> None:
    path, context = tmp_path / "fit.h5", multiprocessing.get_context("fork")
    begun, go_on = context.Event(), context.Event()
    first = context.Process(target=_write, args=(path, begun, go_on))
    first.start()
    assert begun.wait(20)
    with pytest.raises(ArtefactError, match="another process"), replacing(path):
        pass
    go_on.set()
    first.join()
    assert first.exitcode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["fit.h5"]


def test_a_lock_whose_file_was_deleted_or_replaced_is_none(tmp_path: Path) -> None:
    first, second, third = (Lock(tmp_path / "fit.h5") for _ in range(3))
    assert first.take()
    assert not second.take()
    first.path.unlink()
    assert second.take()
    first.release()  # the name belongs to the second now
    assert second.path.exists()
    assert not third.take()
    second.release()
    assert list(tmp_path.iterdir()) == []


# -- a checkpoint that changes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "moment"),
    [(change, 20) for change in CHANGES] + [(CHANGES[0], 120)],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_checkpoint_that_changes_ends_with_3_and_nothing_is_kept(
    change: object, moment: int, spoilt: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    seen = Interrupted(monkeypatch, moment, lambda: change(spoilt))  # type: ignore[operator]
    done = spoilt.audit(tmp_path, "-o", work)
    assert seen.calls >= moment
    assert (done.code, done.out) == (3, "")
    assert "model.safetensors changed or removed while it was audited" in done.err
    assert kept(work) == []
    monkeypatch.undo()
    spoilt.put_back()
    again = spoilt.audit(tmp_path, "-o", work)
    assert spoilt.is_as_expected(again)


def test_hard_links_and_permissions_change_no_checkpoint(
    spoilt: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Interrupted(monkeypatch, 20, lambda: os.link(spoilt.weights, tmp_path / "link"))
    assert spoilt.audit(tmp_path).code == spoilt.expected.code


def test_watching_goes_on_past_a_checkpoint_that_changes(
    spoilt: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        shutil.copytree(spoilt.checkpoint, run / f"checkpoint-{step}")
    first = run / "checkpoint-1" / "model.safetensors"
    Interrupted(monkeypatch, 20, lambda: first.unlink())
    command = spoilt.command("--once")
    done = peel(tmp_path, "watch", run, *command[2:])
    assert "checkpoint-1: model.safetensors changed or removed while it was audited" in done.err
    assert "Going on with the next checkpoint" in done.err
    assert [run["checkpoint"].rpartition("/")[2] for run in done.runs] == ["checkpoint-2"]


# -- leftovers that are damaged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["extract 3/5", "score 2/4"])
def test_damaged_leftovers_are_done_again(line: str, place: Place, tmp_path: Path) -> None:
    left = tmp_path / "left"
    struck = peel_apart(tmp_path / "home", *place.command("-o", left), blow=Blow(line, signal.SIGKILL))
    assert struck.code == -signal.SIGKILL
    damage_all(left, "flipped", random.Random(0))
    done = place.audit(tmp_path, "-o", left)
    assert place.is_as_expected(done), done.err


# -- power cuts ------------------------------------------------------------------------------------------------------


def test_a_power_cut_costs_time_alone(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    with Disk(work).recording(monkeypatch) as disk:
        assert place.is_as_expected(place.audit(tmp_path, "-o", work))
    count = len(disk.cuts)
    for number in (count // 4, 3 * count // 4):
        disk.after_cut(number, work)
        assert place.is_as_expected(place.audit(tmp_path, "-o", work)), number
    disk.after_cut(count - 1, work)
    assert len(list(work.glob("*.h5"))) == 2, "what was whole is on the disk"
