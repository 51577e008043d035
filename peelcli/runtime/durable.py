"""Write files that survive a power cut: the content is on the disk before the file gets its name.

A file is written under a temporary name, forced to the disk, renamed, and then its directory is forced to the disk too.
Everything that peel keeps takes its name through here.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from peelcli.runtime.locks import is_named, open_locked

_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_PAUSE_SECONDS = 0.01


def sync(file: int) -> None:
    """Flush an open file or directory to the disk."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # a file system that cannot, or a pipe
            raise


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    if os.name == "nt":  # Windows opens no directories
        return
    file = os.open(directory, os.O_RDONLY)
    try:
        sync(file)
    finally:
        os.close(file)


def sync_tree(directory: Path) -> None:
    """Flush all files below a directory, and their names, to the disk."""
    for parent, _, names in os.walk(directory):
        for name in names:
            file = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                sync(file)
            finally:
                os.close(file)
        sync_directory(Path(parent))


def take_name(partial: Path, path: Path) -> None:
    """Rename `partial`, which is already on the disk, to `path`."""
    partial.replace(path)
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all, replacing an existing one. Two writers take turns."""
    partial = path.with_name(path.name + ".partial")
    while (file := open_locked(partial)) is None:
        time.sleep(_PAUSE_SECONDS)  # another writes the same file, which takes it no longer than that
    try:
        try:
            os.ftruncate(file, 0)
            write_all(file, text.encode())
            sync(file)
            take_name(partial, path)
        except BaseException:
            if is_named(file, partial):  # else it is another's by now
                partial.unlink()
            raise
    finally:
        os.close(file)


def write_all(file: int, data: bytes | memoryview) -> None:
    """Write all of `data` to an open file."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
