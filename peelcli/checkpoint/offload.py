"""Directories for weights that cannot be read in place: each belongs to one process, and goes with it.

Two processes that shared one would overwrite each other's weights, which bear the same names. What a killed process
left is deleted by the next, which sees that nobody holds its lock.
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
    """A new, empty directory below `base`; deleted when `keep_for` says so, or with the process."""

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
        """Delete it now, unless it has another name by now."""
        self._delete()

    def keep_for(self, modules: Iterable[nn.Module]) -> None:
        """Keep it for as long as accelerate's loader of the weights of these modules is in use."""
        loaders = [getattr(getattr(m, "_hf_hook", None), "weights_map", None) for m in modules]
        loader = next((found.dataset for found in loaders if found is not None), None)
        if loader is None or not any(self.path.iterdir()):
            self.delete()  # everything is read in place
            return
        loader.peel_directory = self


def _delete(path: Path, lock: Lock) -> None:
    shutil.rmtree(path, ignore_errors=True)
    lock.release()


def _delete_abandoned(base: Path, mine: Lock) -> None:
    """Delete what processes that are gone have left; nothing where the file system knows no locks."""
    if (own := open_locked(mine.path, os.O_RDWR)) is not None:
        os.close(own)  # a lock that can be taken twice is none
        return
    for left in base.glob(f"{_PREFIX}*.lock"):
        try:
            file = open_locked(left, os.O_RDWR)
        except FileNotFoundError:
            continue  # another has deleted it meanwhile
        if file is None:
            continue
        try:
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink(missing_ok=True)
        finally:
            os.close(file)
