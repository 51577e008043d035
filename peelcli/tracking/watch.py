"""Watch a directory for checkpoints that are complete and new."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.training_step import training_step
from peelcli.errors import CheckpointError
from peelcli.tracking.series import Member, natural_key

_Signature = tuple[tuple[str, int, int], ...]  # name, size and time of change of every file


class Watch:
    """Looks at a directory repeatedly, and returns each checkpoint once, when it is complete and no longer changes.

    A checkpoint is at rest where two looks in a row found the same files: the weights may be whole before the rest is
    there. One that is written over is named again.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.warnings: list[str] = []  # what the last look found that is at rest and not whole
        self._last: dict[Path, _Signature] = {}
        self._settled: dict[Path, _Signature] = {}  # named, or told to be incomplete

    def look(self) -> list[Member]:
        """The new checkpoints, by step if all have one, else by name."""
        self.warnings = []
        seen = {path: _signature(path) for path in self._candidates()}
        found = []
        for path, signature in seen.items():
            if self._last.get(path) == signature != self._settled.get(path):
                self._settled[path] = signature
                found += self._whole(path)
        self._last = seen
        found.sort(key=lambda member: natural_key(member.path.name))
        if all(member.step is not None for member in found):
            found.sort(key=lambda member: member.step or 0)
        return found

    @property
    def restless(self) -> list[str]:
        """The names of checkpoints that changed since the look before; they may still be being written."""
        return [path.name for path, signature in self._last.items() if self._settled.get(path) != signature]

    def _candidates(self) -> Iterator[Path]:
        """The directory itself, which may hold the run's final model, and the directories directly below it."""
        if (self.directory / "config.json").is_file():
            yield self.directory
        try:
            children = sorted(self.directory.iterdir())
        except FileNotFoundError:  # the run has not begun
            return
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}: cannot be watched ({error.strerror}); name the directory to which checkpoints are "
                "saved"
            ) from error
        for child in children:
            hidden = child.name.startswith((".", "tmp-"))  # tmp-checkpoint-400 is being written
            if not hidden and (child / "config.json").is_file():
                yield child

    def _whole(self, path: Path) -> list[Member]:
        try:
            open_checkpoint(path)
            return [Member(path, training_step(path))]
        except (CheckpointError, OSError) as error:
            if path.is_dir():
                self.warnings.append(f"not whole, looked at again once it changes: {error}")
            return []


def _signature(directory: Path) -> _Signature:
    found = []
    try:
        with os.scandir(directory) as files:
            for file in files:
                if file.is_file():
                    status = file.stat()
                    found.append((file.name, status.st_size, status.st_mtime_ns))
    except OSError:  # removed while it was looked at: not the same the next time
        return ()
    return tuple(sorted(found))
