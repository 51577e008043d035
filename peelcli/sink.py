"""A file for HDF5 to write to that bears a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peelcli.errors import ArtefactError

try:
    import fcntl
except ImportError:  # Windows locks what it opens by itself
    fcntl = None  # type: ignore[assignment]


class Sink:
    """A file for HDF5 to write to, which hides from it that the disk is full until `check` says so.

    HDF5 cannot close a file after a write that failed: it fails anew, prints past us, and at times takes the process
    with it. So it is let believe that all went well; what it writes after the first failure goes nowhere.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        """Open for reading and writing, emptied where `new`. ArtefactError where another process writes it."""
        self.path = path
        self.error: OSError | None = None
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if new else 0), 0o666)  # not emptied before it is ours
        self._file = open(handle, "r+b", buffering=0)  # noqa: SIM115  # closed by `close`
        self._lock()
        if new:
            self._file.truncate(0)

    def _lock(self) -> None:
        """Lock the file as HDF5 locks what it opens itself; a file system without locks goes without."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ArtefactError(
                f"{self.path}: another process is writing this file. Wait for it to end, or name another place "
                "with --output."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise

    def check(self) -> None:
        """Raise the OSError of the first write that failed."""
        if self.error is not None:
            raise self.error

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            self.error = error

    def write(self, data: Any) -> int:
        """Write all of `data`, or note why not."""
        left = memoryview(data).cast("B")
        size = len(left)
        with self._trying():
            while self.error is None and left:
                left = left[self._file.write(left) :]
        return size

    def truncate(self, size: int) -> int:
        """Make the file `size` bytes long, or note why not."""
        with self._trying():
            if self.error is None:
                self._file.truncate(size)
        return size

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes from where the file stands."""
        return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from where the file stands; returns how many bytes there were."""
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Where the file stands."""
        return self._file.tell()

    def flush(self) -> None:
        """Nothing waits here: what was written is the system's."""

    def close(self) -> None:
        """Let go of the file and of its lock."""
        self._file.close()
