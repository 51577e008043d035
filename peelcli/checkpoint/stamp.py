"""Record the state of a checkpoint's files before they are read, and later check that they have not changed.

Files are compared by size, modification time and inode, without reading them. The inode's change time (ctime) is
compared too, because a copy that restores the modification time, as `rsync -t` does, still changes it. A new hard link
or new permissions change only the ctime and no content, so those changes are ignored.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peelcli.errors import CheckpointChangedError

# Files that are read besides the weights, and files that would be read instead if they existed.
_READ = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)
_TICK_SECONDS = 0.02  # two writes within one tick of the kernel's clock leave the same time
_LONGEST_TICK_SECONDS = 2.0  # of file systems that keep whole seconds, or even ones

# size, mtime_ns, inode, device | ctime_ns | number of links, mode, owner, group
_State = tuple[tuple[int, ...], int, tuple[int, ...]]


def _state(file: Path) -> _State | None:
    """The recorded state of one file; None if it does not exist."""
    try:
        s = file.stat()
    except OSError:
        return None
    ctime = s.st_ctime_ns if os.name != "nt" else 0  # there it is the time of creation
    links = (s.st_nlink, s.st_mode, s.st_uid, s.st_gid)
    return (s.st_size, s.st_mtime_ns, s.st_ino, s.st_dev), ctime, links


def _differs(before: _State | None, now: _State | None) -> bool:
    if before is None or now is None:
        return before is not now
    return before[0] != now[0] or (before[1] != now[1] and before[2] == now[2])


@dataclass(frozen=True)
class Stamp:
    """The recorded state of one checkpoint's files. A stamp of no files reports no change."""

    directory: Path = Path()
    states: tuple[tuple[Path, _State | None], ...] = ()

    @classmethod
    def of(cls, directory: Path) -> Stamp:
        """Record the files of `directory`; call this before any of them is read."""
        while True:
            names = set(_READ)
            with contextlib.suppress(OSError):
                names |= {entry.name for entry in os.scandir(directory) if entry.is_file()}
            states = [(directory / name, _state(directory / name)) for name in sorted(names)]
            newest = max((s[1] for _, s in states if s is not None), default=0)
            tick = _TICK_SECONDS if newest % 10**9 else _LONGEST_TICK_SECONDS
            age = time.time() - newest / 1e9
            if not 0 <= age < tick:
                return cls(directory, tuple(states))
            time.sleep(tick - age)  # a write within the same clock tick would go unnoticed

    def restricted(self, weights: tuple[Path, ...]) -> Stamp:
        """The part of the stamp for `weights` and the files read with them, without others such as optimiser state."""
        wanted = {self.directory / name for name in _READ} | set(weights)
        return Stamp(self.directory, tuple(item for item in self.states if item[0] in wanted))

    def differences(self) -> list[str]:
        """The names of files that have changed since they were recorded."""
        return [file.name for file, before in self.states if _differs(before, _state(file))]

    def require_unchanged(self) -> None:
        """Raise CheckpointChangedError if a file has changed since it was recorded."""
        if changed := self.differences():
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise CheckpointChangedError(self.directory, changed[0] + more)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the context, any exception becomes a CheckpointChangedError if a file has changed meanwhile."""
        try:
            yield
        except CheckpointChangedError:
            raise
        except Exception as error:
            try:
                self.require_unchanged()
            except CheckpointChangedError as changed:
                raise changed from error
            raise

    @property
    def key(self) -> list[list[object]]:
        """The recorded states as JSON values, for the keys of results computed from these files."""
        return [[file.name, *s[0][:3], s[1]] for file, s in self.states if s is not None]


UNSTAMPED = Stamp()
