"""A file for HDF5 to write to that bears a full disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peelcli.errors import ArtefactError
from peelcli.runtime import durable
from peelcli.runtime.locks import is_named, open_locked, unlock

_SEAL = b"\npeel sha256 "
_SEAL_NBYTES = len(_SEAL) + 64
_PIECE_NBYTES = 2**22


def is_sealed(path: Path) -> bool:
    """Whether the file is as it was when `DiskFullWriter.seal` had been through with it."""
    try:
        with path.open("rb", buffering=0) as file:
            left = os.fstat(file.fileno()).st_size - _SEAL_NBYTES
            digest = hashlib.sha256()
            while left > 0 and (piece := file.read(min(left, _PIECE_NBYTES))):
                digest.update(piece)
                left -= len(piece)
            return left == 0 and file.read() == _SEAL + digest.hexdigest().encode()
    except OSError:
        return False


class DiskFullWriter:
    """A file for HDF5 to write to, which hides from it that the disk is full until `check` says so.

    HDF5 cannot close a file after a write that failed: it fails anew, prints past us, and at times takes the process
    with it. So it is let believe that all went well; what it writes after the first failure goes nowhere.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        """Open for reading and writing, emptied where `new`. ArtefactError where another process writes it."""
        self.path = path
        self.error: OSError | None = None
        handle = open_locked(path, os.O_RDWR | (os.O_CREAT if new else 0))  # not emptied before it is ours
        if handle is None:
            raise ArtefactError(
                f"{path}: another process is writing this file. Wait for it to end, or name another place "
                "with --output."
            )
        self._file = open(handle, "r+b", buffering=0)  # noqa: SIM115  # closed by `close`
        if new:
            self._file.truncate(0)

    def sync(self) -> None:
        """Force what was written to the disk. Raises the OSError of the first write that failed."""
        self.check()
        durable.sync(self._file.fileno())

    def take_name(self, path: Path) -> None:
        """Give the file its final name, once all of it is on the disk; it is locked until then."""
        self.sync()
        self.path.replace(path)
        unlock(self._file.fileno())  # from now on it may be read
        durable.sync_directory(path.parent)

    def seal(self) -> None:
        """Put a checksum of all that was written behind it. HDF5 does not look behind its own end."""
        self.seek(0)
        digest = hashlib.sha256()
        while piece := self._file.read(_PIECE_NBYTES):
            digest.update(piece)
        self.seek(0, os.SEEK_END)
        self.write(_SEAL + digest.hexdigest().encode())

    def delete(self) -> None:
        """Delete the file, while it is locked, unless it has another name by now."""
        if not self._file.closed and is_named(self._file.fileno(), self.path):
            self.path.unlink()

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
