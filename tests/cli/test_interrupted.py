"""What ends a command from outside: Ctrl-C, kill -9, a full disk, a closed pipe."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
from tiny import AUDIT, EXTRACT, FIT, Blow, Done, leftovers, peel, peel_apart, save_ids, save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and token ids beside it."""
    base = tmp_path_factory.mktemp("base")
    save_tiny(base / "ckpt")
    save_ids(base / "ids.npy")
    return base


@pytest.fixture(scope="module")
def undisturbed(base: Path) -> Done:
    """The audit that nothing interrupted."""
    done = peel(
        base / "undisturbed", "audit", base / "ckpt", "--data", base / "ids.npy", *AUDIT, "-f", "json"
    )
    assert done.code in (0, 1), done.err
    return done


BLOWS = [
    Blow("extract 2/5", signal.SIGKILL, 0.005),
    Blow("fit 1/3", signal.SIGKILL, 0.02),
    Blow("fit 2/3", signal.SIGINT, 0.02),
    Blow("challenge 1/3", signal.SIGKILL),
    Blow("score 2/4", signal.SIGKILL, 0.005),
]


@pytest.mark.parametrize("blow", BLOWS, ids=lambda blow: f"{blow.line}, {blow.number.name}")
def test_the_same_command_goes_on_and_comes_to_the_same_end(
    blow: Blow, base: Path, undisturbed: Done, tmp_path: Path
) -> None:
    command = ("audit", base / "ckpt", "--data", base / "ids.npy", *AUDIT, "-f", "json")
    struck = peel_apart(tmp_path, *command, blow=blow)
    assert struck.out == ""
    if blow.number == signal.SIGINT:
        assert struck.code == 130
        assert struck.err.splitlines()[-1] == (
            "error: interrupted; what was done is kept, and the same command goes on from there"
        )
    else:
        assert struck.code == -signal.SIGKILL
    work = next((tmp_path / "peel").iterdir())
    assert not list(work.glob("fit-*.h5"))
    before = {
        path: path.stat().st_mtime_ns for path in work.rglob("*.h5")
    }  # whole files, and whole parts of the fit
    done = peel(tmp_path, *command)
    assert (done.code, done.runs) == (undisturbed.code, undisturbed.runs)
    assert [path.suffix for path in sorted(work.glob("*.*"))] == [".h5", ".h5", ".json"]
    # What was whole was not done again: an extraction kept its file, and a stage that was over is not begun anew.
    acts = [path for path in before if path.name.startswith("acts-")]
    assert all(path.stat().st_mtime_ns == before[path] for path in acts)
    assert bool(acts) != ("extract" in done.stages)


def test_a_killed_extraction_goes_on_from_its_last_whole_layer(base: Path, tmp_path: Path) -> None:
    command = ("extract", base / "ckpt", "--data", base / "ids.npy", *EXTRACT)
    assert peel_apart(tmp_path, *command, blow=Blow("extract 3/5", signal.SIGKILL)).code == -signal.SIGKILL
    done = peel(tmp_path, *command)
    first = next(line for line in done.err.splitlines() if line.startswith("extract"))
    assert int(re.findall(r"\d+", first)[0]) >= 3
    assert done.code == 0
    whole = peel(tmp_path / "again", *command)
    with h5py.File(done.out.strip()) as resumed, h5py.File(whole.out.strip()) as straight:
        for name in ("ids", "nll", "entropy", *(f"states/{layer:03d}" for layer in range(4))):
            assert (resumed[name][...] == straight[name][...]).all(), name


def test_a_killed_sweep_goes_on_from_its_last_whole_layer_unless_told_otherwise(
    base: Path, tmp_path: Path
) -> None:
    command = ("audit", base / "ckpt", "--data", base / "ids.npy", *AUDIT)
    struck = peel_apart(tmp_path, *command, blow=Blow("score 2/4", signal.SIGKILL))
    assert struck.code == -signal.SIGKILL
    work = next((tmp_path / "peel").iterdir())
    (scratch,) = work.glob("fit-*.parts")
    kept = {path.name: path.read_bytes() for path in scratch.iterdir()}
    assert any(name.endswith(".states") for name in kept)
    done = peel(tmp_path, *command)
    assert "score 2/4 layer 3" in done.err
    assert "score 0/4" not in done.err
    for fit in work.glob("fit-*.h5"):
        fit.unlink()
    scratch.mkdir()
    for name, content in kept.items():
        (scratch / name).write_bytes(content)
    done = peel(tmp_path, *command, "--no-resume")
    assert "score 0/4 layer 1" in done.err


# -- a full disk -------------------------------------------------------------------------------------------------------


def assert_full(done: Done, words: str = "no space left on the disk") -> None:
    assert (done.code, done.out) == (3, "")
    (message,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert words in message
    assert "--output" in message
    for noise in ("Traceback", "Exception ignored", "h5py", "mistake in peel"):
        assert noise not in done.err


@pytest.mark.parametrize("largest_file", [1_000, 10_000, 200_000])
def test_no_room_for_the_scan_or_the_states(largest_file: int, base: Path, tmp_path: Path) -> None:
    command = ("extract", base / "ckpt", "--data", base / "ids.npy", *EXTRACT)
    assert_full(peel_apart(tmp_path, *command, largest_file=largest_file))
    assert leftovers(tmp_path / "peel") == []
    assert peel(tmp_path, *command).code == 0


@pytest.mark.parametrize("largest_file", [10_000, 100_000])
def test_no_room_for_the_parts_or_the_sweep_of_a_fit(largest_file: int, base: Path, tmp_path: Path) -> None:
    acts = peel(tmp_path, "extract", base / "ckpt", "--data", base / "ids.npy", *EXTRACT).out.strip()
    assert_full(peel_apart(tmp_path, "fit", acts, *FIT, largest_file=largest_file))
    assert leftovers(tmp_path / "peel") == [Path(acts).name]
    done = peel(tmp_path, "fit", acts, *FIT)
    assert done.code == 0
    assert Path(done.out.strip()).is_file()


def test_no_room_for_a_grafted_checkpoint(base: Path, tmp_path: Path) -> None:
    acts = peel(tmp_path, "extract", base / "ckpt", "--data", base / "ids.npy", *EXTRACT).out.strip()
    fit = peel(tmp_path, "fit", acts, *FIT, "--references", "identity").out.strip()
    command = ("graft", fit, base / "ckpt", "--layer", "1", "-o", tmp_path / "new")
    assert_full(peel_apart(tmp_path, *command, largest_file=20_000))
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.partial").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB; skipped where this user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


# The states take 328 kB and their file 360: told beforehand, while it is written, and while the fit writes its own.
FULL = [(300_000, "MB are free", 0), (172_000, "no space left on the disk", 0), (130_000, "no space left", 1)]


@pytest.mark.parametrize(("taken", "words", "whole"), FULL)
def test_a_disk_that_is_really_full(
    taken: int, words: str, whole: int, small_disk: Path, base: Path, tmp_path: Path
) -> None:
    (small_disk / "ballast").write_bytes(bytes(taken))
    done = peel_apart(
        tmp_path / "home", "audit", base / "ckpt", "--data", base / "ids.npy", *AUDIT, "-o", small_disk
    )
    assert_full(done, words)
    assert leftovers(small_disk) == [path.name for path in small_disk.glob("acts-*.h5")]
    assert len(leftovers(small_disk)) == whole


# -- a closed pipe -----------------------------------------------------------------------------------------------------


def test_a_report_into_a_closed_pipe_keeps_its_exit_code(base: Path, tmp_path: Path) -> None:
    home = base / "undisturbed"
    command = ("audit", base / "ckpt", "--data", base / "ids.npy", *AUDIT)
    code = peel(home, *command).code
    done = peel_apart(home, *command, closed_pipe=True)
    assert (done.code, done.out) == (code, "")
    assert "Traceback" not in done.err
    assert "BrokenPipe" not in done.err
