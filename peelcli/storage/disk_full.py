"""A file object for HDF5 that survives a full disk and reports it afterwards."""

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
    """Whether the file is unchanged since `DiskFullWriter.seal`."""
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
    """A file object for HDF5 that hides write errors from HDF5 until `check` raises the first one.

    HDF5 cannot close a file after a failed write: closing fails again, prints to stderr, and sometimes crashes the
    process. So every write appears to succeed, and writes after the first failure are discarded.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        """Open for reading and writing. new: empty the file. Raises ArtefactError if another process writes it."""
        self.path = path
        self.error: OSError | None = None
        handle = open_locked(path, os.O_RDWR | (os.O_CREAT if new else 0))  # emptied only once it is locked
        if handle is None:
            raise ArtefactError(
                f"{path}: another process is writing this file. Wait for it to end, or name another place "
                "with --output."
            )
        self._file = open(handle, "r+b", buffering=0)  # noqa: SIM115  # closed by `close`
        if new:
            self._file.truncate(0)

    def sync(self) -> None:
        """Flush all writes to the disk. Raises the OSError of the first failed write."""
        self.check()
        durable.sync(self._file.fileno())

    def take_name(self, path: Path) -> None:
        """Sync the file, give it its final name, and release its lock."""
        self.sync()
        self.path.replace(path)
        unlock(self._file.fileno())  # other processes may read it now
        durable.sync_directory(path.parent)

    def seal(self) -> None:
        """Append a checksum of the whole file. HDF5 ignores bytes after its own end."""
        self.seek(0)
        digest = hashlib.sha256()
        while piece := self._file.read(_PIECE_NBYTES):
            digest.update(piece)
        self.seek(0, os.SEEK_END)
        self.write(_SEAL + digest.hexdigest().encode())

    def delete(self) -> None:
        """Delete the file while it is still locked, unless it already has its final name."""
        if not self._file.closed and is_named(self._file.fileno(), self.path):
            self.path.unlink()

    def check(self) -> None:
        """Raise the OSError of the first failed write, if there was one."""
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
        """Write all of `data`; an error is stored for `check`."""
        left = memoryview(data).cast("B")
        size = len(left)
        with self._trying():
            while self.error is None and left:
                left = left[self._file.write(left) :]
        return size

    def truncate(self, size: int) -> int:
        """Make the file `size` bytes long; an error is stored for `check`."""
        with self._trying():
            if self.error is None:
                self._file.truncate(size)
        return size

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes from the current position."""
        return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the current position; returns the number of bytes read."""
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move the current position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The current position."""
        return self._file.tell()

    def flush(self) -> None:
        """Do nothing: writes are unbuffered."""

    def close(self) -> None:
        """Close the file, which releases its lock."""
        self._file.close()
