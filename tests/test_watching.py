"""What is named of a watched directory: every checkpoint once, whole and at rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peelcli.errors import CheckpointError
from peelcli.tracking.watch import Watch


def checkpoint(directory: Path, step: int | None = None) -> Path:
    """The least that is complete."""
    directory.mkdir(parents=True)
    save_file({"x": torch.zeros(4)}, directory / "model.safetensors")
    if step is not None:
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (directory / "config.json").write_text("{}")
    return directory


def names(watched: Watch) -> list[str]:
    return [member.path.name for member in watched.look()]


def test_each_is_named_once_when_two_looks_saw_the_same(tmp_path: Path) -> None:
    watched = Watch(tmp_path / "run")
    assert names(watched) == []  # not there yet
    for number in (90, 1000):
        checkpoint(tmp_path / "run" / f"checkpoint-{number}")
    assert names(watched) == []
    assert watched.restless == ["checkpoint-1000", "checkpoint-90"]
    assert names(watched) == ["checkpoint-90", "checkpoint-1000"]
    assert (names(watched), watched.restless) == ([], [])
    checkpoint(tmp_path / "run" / "epoch", step=500)
    checkpoint(tmp_path / "run" / "checkpoint-2000")
    assert [names(watched) for _ in range(3)] == [[], ["epoch", "checkpoint-2000"], []]


def test_what_is_being_written_is_left_until_it_rests(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "checkpoint-1")
    watched = Watch(tmp_path)
    for number in range(3):
        (directory / f"optimizer-{number}.pt").write_bytes(b"x")
        assert names(watched) == []
    assert names(watched) == ["checkpoint-1"]


def test_one_that_is_not_whole_is_told_once_and_named_when_it_is(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "checkpoint-1")
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[:-1])
    watched = Watch(tmp_path)
    told = []
    for _ in range(4):
        assert names(watched) == []
        told += watched.warnings
    (warning,) = told
    assert "checkpoint-1" in warning
    (directory / "model.safetensors").write_bytes(weights)
    assert [names(watched) for _ in range(3)] == [[], ["checkpoint-1"], []]


def test_one_that_is_written_over_is_new(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "last")
    watched = Watch(tmp_path)
    assert [names(watched) for _ in range(3)] == [[], ["last"], []]
    save_file({"x": torch.ones(8)}, directory / "model.safetensors")
    assert [names(watched) for _ in range(3)] == [[], ["last"], []]


def test_logs_hidden_and_temporary_directories_are_none(tmp_path: Path) -> None:
    for name in ("tmp-checkpoint-5", ".cache"):
        checkpoint(tmp_path / name)
    (tmp_path / "logs").mkdir()
    (tmp_path / "checkpoint-7").mkdir()  # no config yet
    (tmp_path / "config.json").write_text("{}")  # a model that is saved beside its run, and not whole
    watched = Watch(tmp_path)
    assert [names(watched) for _ in range(2)] == [[], []]
    assert len(watched.warnings) == 1


def test_one_that_is_removed_is_forgotten(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint-1")
    watched = Watch(tmp_path)
    watched.look()
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert [names(watched) for _ in range(2)] == [[], []]
    assert watched.warnings == []


def test_what_cannot_be_watched_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be watched"):
        Watch(tmp_path / "file").look()
