"""Temporary directories for weights that cannot be read in place. Each belongs to one process and ends with it.

Two processes that shared a directory would overwrite each other's weights, because the file names are the same. A
killed process leaves its directory behind. The next process deletes it, since nobody holds its lock.
"""

from __future__ import annotations

import os
import secrets
import shutil
import weakref
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from peelcli.runtime.locks import Lock, open_locked

_PREFIX = "of-process-"


class PrivateDirectory:
    """A new, empty directory below `base`. It is deleted with the loader given to `keep_for`, or with the process."""

    def __init__(self, base: Path) -> None:
        while True:
            self.path = base / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
            lock = Lock(self.path)
            if lock.take():
                break
        _delete_abandoned(base, lock)
        self.path.mkdir()
        self._delete = weakref.finalize(self, _delete, self.path, lock)

    def delete(self) -> None:
        """Delete the directory now, unless it was renamed."""
        self._delete()

    def keep_for(self, modules: Iterable[nn.Module]) -> None:
        """Keep the directory as long as accelerate's loader for the weights of these modules is in use."""
        loaders = [getattr(getattr(m, "_hf_hook", None), "weights_map", None) for m in modules]
        loader = next((found.dataset for found in loaders if found is not None), None)
        if loader is None or not any(self.path.iterdir()):
            self.delete()  # all weights are read in place
            return
        loader.peel_directory = self


def _delete(path: Path, lock: Lock) -> None:
    shutil.rmtree(path, ignore_errors=True)
    lock.release()


def _delete_abandoned(base: Path, mine: Lock) -> None:
    """Delete the directories of ended processes. Does nothing on a file system without locks."""
    if (own := open_locked(mine.path, os.O_RDWR)) is not None:
        os.close(own)  # this lock could be taken twice, so the file system does not support locks
        return
    for left in base.glob(f"{_PREFIX}*.lock"):
        try:
            file = open_locked(left, os.O_RDWR)
        except FileNotFoundError:
            continue  # another process has deleted it meanwhile
        if file is None:
            continue
        try:
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink(missing_ok=True)
        finally:
            os.close(file)
