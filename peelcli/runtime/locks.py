"""Locks between processes. A lock ends with its process. Without file-system locks, peel runs unlocked.

A lock is a file of its own beside what it protects, NAME.lock, and is deleted by who lets go of it. So whoever gets the
lock of an open file looks whether the file still has its name: another may have deleted or replaced it meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Generator
from pathlib import Path
from types import TracebackType

from peelcli.errors import BusyError
from peelcli.records.progress import Progress

try:
    import fcntl
except ImportError:  # Windows locks what it opens by itself
    fcntl = None  # type: ignore[assignment]

POLL_SECONDS = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def try_lock(file: int, *, shared: bool = False) -> bool:
    """Lock an open file for this process; False if another process holds the lock."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def unlock(file: int) -> None:
    """Release the lock of an open file that stays open."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # where there are no locks
            fcntl.flock(file, fcntl.LOCK_UN)


def is_named(file: int, path: Path) -> bool:
    """Whether `path` is still the name of an open file."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def open_locked(path: Path, flags: int = os.O_RDWR | os.O_CREAT, *, shared: bool = False) -> int | None:
    """The file `path`, opened and locked with its content unchanged; None if another process holds the lock."""
    while True:
        file = os.open(path, flags, 0o666)
        try:
            if not try_lock(file, shared=shared):
                os.close(file)
                return None
            if is_named(file, path):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its name was given to another file, or deleted, before it was ours


class Lock:
    """The lock of one artefact, as a context manager that releases it at the end."""

    def __init__(self, artefact: Path) -> None:
        self.path = artefact.with_name(artefact.name + ".lock")
        self._file: int | None = None

    def take(self) -> bool:
        """Take the lock; False if another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_locked(self.path)
        if self._file is None:
            return False
        os.truncate(self._file, 0)
        os.write(self._file, str(os.getpid()).encode())
        return True

    def holder(self) -> str:
        """The process that holds the lock, such as " (process 123)"; "" if it is unknown."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = self.path.read_bytes()[:20].decode("ascii")
            return f" (process {text})" if text.isdigit() else ""
        return ""

    def release(self) -> None:
        """Release the lock and delete its file."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if is_named(file, self.path):
                self.path.unlink(missing_ok=True)  # while it is locked: nobody else's
        finally:
            os.close(file)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def held(artefact: Path, *, wait: bool) -> Generator[Progress, None, Lock]:
    """The lock of `artefact`. If it is taken, waits for it, or raises BusyError if `wait` is False."""
    lock = Lock(artefact)
    waits = False
    while not lock.take():
        who = f"{artefact}: another peel process{lock.holder()} is working on this file"
        if not wait:
            raise BusyError(
                f"{who}, and --no-wait says not to wait for it. Run again once it has ended, or without --no-wait."
            )
        note = (
            f"{who}. Waiting for it to end, to use what it has done; --no-wait ends with exit code 3 instead."
        )
        yield Progress("wait", 0, 1, "for another process", note="" if waits else note)
        waits = True
        time.sleep(POLL_SECONDS)
    if waits:
        yield Progress("wait", 1, 1, "the other process has ended")
    return lock
