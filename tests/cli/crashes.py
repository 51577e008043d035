"""What may befall an audit: another beside it, a checkpoint that changes, damaged leftovers, and a power cut."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import AUDIT, Done, peel, peel_apart, save_ids, save_tiny

REFERENCES = ("--references", "identity,direct,rescale", "--paths", "last")
OPTIONS = (*AUDIT, *REFERENCES, "-f", "json")


class Place:
    """A tiny checkpoint with its ids, and the audit that nothing disturbed."""

    def __init__(self, base: Path) -> None:
        self.base, self.checkpoint = base, base / "ckpt"
        save_tiny(self.checkpoint)
        save_ids(base / "ids.npy")
        self.weights = self.checkpoint / "model.safetensors"
        self.good = self.weights.read_bytes()
        self.expected = self.audit(base / "undisturbed")
        assert self.expected.code in (0, 1), self.expected.err

    def command(self, *more: object) -> tuple[object, ...]:
        """The audit's command line."""
        return ("audit", self.checkpoint, "--data", self.base / "ids.npy", *OPTIONS, *more)

    def audit(self, home: Path, *more: object) -> Done:
        """Audit in this process."""
        return peel(home, *self.command(*more))

    def is_as_expected(self, done: Done) -> bool:
        """Whether an audit came out as the undisturbed one, figure for figure."""
        return done.code == self.expected.code and done.runs == self.expected.runs

    def put_back(self) -> None:
        """Make the checkpoint good again."""
        self.weights.unlink(missing_ok=True)
        self.weights.write_bytes(self.good)


# -- two at once -----------------------------------------------------------------------------------------------------


def at_once(place: Place, work: Path, *more: object) -> list[Done]:
    """Two audits in one work directory, each a process of its own; each has the next line's arguments in common."""
    found: dict[int, Done] = {}

    def one(number: int) -> None:
        home = work.with_name(f"{work.name}-home-{number}")
        found[number] = peel_apart(home, *place.command("-o", work, *more))

    threads = [threading.Thread(target=one, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[0], found[1]]


# -- a checkpoint that changes ---------------------------------------------------------------------------------------


def overwritten(place: Place) -> None:
    """The last weights become zeros in place, and the old modification time is set again."""
    before = place.weights.stat()
    with place.weights.open("r+b") as file:
        file.seek(-3000, 2)
        file.write(bytes(3000))
    os.utime(place.weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncated(place: Place) -> None:
    """The file loses half of its bytes."""
    os.truncate(place.weights, len(place.good) // 2)


def replaced(place: Place) -> None:
    """Another file of the same size takes the name, with the old modification time."""
    before, new = place.weights.stat(), place.weights.with_name("new")
    new.write_bytes(place.good[:-3000] + bytes(3000))
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(place.weights)


def deleted(place: Place) -> None:
    """The file is gone."""
    place.weights.unlink()


CHANGES: tuple[Callable[[Place], None], ...] = (overwritten, truncated, replaced, deleted)


class Interrupted:
    """Do something the moment the audit in this process reads its n-th thing of a kind."""

    def __init__(self, patch: pytest.MonkeyPatch, moment: int, act: Callable[[], None]) -> None:
        from peelcli.checkpoint.weights import BlockWeights

        self.calls, own = 0, BlockWeights._read

        def read(weights: BlockWeights, layer: int, name: str) -> object:
            if self.calls == moment:
                act()
            self.calls += 1
            return own(weights, layer, name)

        patch.setattr(BlockWeights, "_read", read)


def kept(work: Path) -> list[str]:
    """What a disturbed audit must not leave: anything but a scan and whole states."""
    names = [path.name for path in work.rglob("*") if path.is_file() and not path.name.startswith("acts-")]
    partial = [path.name for path in work.rglob("*.partial*")]
    return sorted({name for name in names if name != "scan.json"} | set(partial))


# -- leftovers that are damaged --------------------------------------------------------------------------------------


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Flip a bit of a file, cut it short, or fill it with garbage."""
    content = bytearray(path.read_bytes())
    if how == "flipped" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "truncated":
        del content[rng.randrange(len(content) + 1) :]
    elif how == "garbage":
        content = bytearray(rng.randbytes(len(content) or 10))
    elif how == "empty":
        content.clear()
    path.write_bytes(content)


def damage_all(work: Path, how: str, rng: random.Random) -> int:
    """Damage every leftover in a work directory but finished files; returns how many those were."""
    files = [path for path in work.rglob("*") if path.is_file()]
    left = [path for path in files if not (path.suffix == ".h5" and path.parent == work)]
    for path in left:
        damage(path, how, rng)
    return len(left)


# -- power cuts ------------------------------------------------------------------------------------------------------


class Disk:
    """What a disk would hold after a power cut: contents as of their last fsync, under names that were synced too.

    It sees every `os.fsync` of the process. A file whose name was synced and whose content was not is empty.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}  # inode → what is on the disk
        self.names: dict[Path, dict[str, int]] = {}  # directory → name → inode
        self.held: list[int] = []  # files kept open, so that no inode's number is given away again
        self.cuts: list[Callable[[], dict[Path, bytes]]] = []

    @contextlib.contextmanager
    def recording(self, patch: pytest.MonkeyPatch) -> Iterator[Disk]:
        """See the fsyncs of what is done in the context."""
        own = os.fsync

        def fsync(file: int) -> None:
            own(file)
            self._saw(file)

        patch.setattr(os, "fsync", fsync)
        try:
            yield self
        finally:
            patch.undo()
            for file in self.held:
                os.close(file)

    def _saw(self, file: int) -> None:
        status, path = os.fstat(file), Path(os.readlink(f"/proc/self/fd/{file}"))
        if stat.S_ISDIR(status.st_mode):
            self.names[path] = {child.name: self._inode(child) for child in path.iterdir() if child.is_file()}
        else:
            self.held.append(os.dup(file))
            with open(f"/proc/self/fd/{file}", "rb") as same:
                self.contents[status.st_ino] = same.read()
        names, contents = {d: dict(n) for d, n in self.names.items()}, dict(self.contents)
        self.cuts.append(
            lambda: {
                d / name: contents.get(inode, b"")
                for d, found in names.items()
                for name, inode in found.items()
            }
        )

    def _inode(self, path: Path) -> int:
        self.held.append(os.open(path, os.O_RDONLY))
        return path.stat().st_ino

    def after_cut(self, number: int, root: Path) -> None:
        """Lay out at `root` what the disk held after the n-th fsync."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        for path, content in self.cuts[number]().items():
            if path.is_relative_to(self.root):
                target = root / path.relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
