"""Read peel's HDF5 files as untrusted input. All reading of HDF5 in peel goes through this file. No torch.

An HDF5 file can name other files (external links, external storage, virtual datasets), hold a dataset of terabytes in
a kilobyte, and hang itself up in circles. peel writes nothing of that kind, and here it is refused: a file is read
along hard links alone, as plain numbers and text, each as long as its bytes in the file. Every error that HDF5 raises
of a damaged file becomes an ArtefactError that names the file and the place.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from peelcli.errors import ArtefactError
from peelcli.runtime.small_files import NOT_FINITE, parse_json

DIGEST, NON_FINITE, CHECKED = "sha256", "non_finite", "checked"
_LONGEST_TEXT, _LONGEST_ATTRIBUTE = 2**28, 2**20  # bytes
_MOST_CHUNKS = 2**20  # of one dataset
_MOST_LINKS = 2**20  # of one group
_DENSEST = 64  # times the room on the disk: a file system that compresses may pack zeros so; a hole is denser
_LAYOUTS = (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED)
# What HDF5 and h5py raise at any access to a damaged file.
_DAMAGE = (
    OSError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    SystemError,
    ArithmeticError,
)


class StoredFile:
    """An open HDF5 file of peel: the path, size and checks that all its groups share."""

    def __init__(self, path: Path, file: h5py.File, command: str) -> None:
        """file: open, and closed by `close`. command: the command that makes such a file, for messages."""
        self.path, self._file, self._command = path, file, command
        found = os.stat(path)
        room = getattr(found, "st_blocks", 0) * 512 or found.st_size
        self._nbytes = min(found.st_size, _DENSEST * room + 2**20)
        self._claimed: set[int] = set()  # addresses of the datasets that were read
        self._claimed_nbytes = 0
        self.root = Group(self, file, "")
        with self.reading("the root"):
            self.is_checked = CHECKED in file.attrs

    @contextmanager
    def reading(self, what: str, *, thing: str = "it") -> Iterator[None]:
        """Within the context, an error that damage can cause becomes an ArtefactError that names `what`."""
        try:
            yield
        except _DAMAGE as error:
            detail = " ".join(str(error).split()) or type(error).__name__
            raise ArtefactError(
                f"{self.path}: {what!r} is damaged ({detail}); make {thing} anew with `{self._command}`."
            ) from error

    def claim(self, address: int, nbytes: int) -> None:
        """Count the bytes of a dataset. Raises ValueError if all datasets together have more bytes than the file."""
        self._claimed_nbytes += 0 if address in self._claimed else nbytes
        self._claimed.add(address)
        if self._claimed_nbytes > self._nbytes:
            raise ValueError(f"more bytes are said to be stored than the file of {self._nbytes:,} has")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> StoredFile:
        """This object, for use in a `with` statement."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


class Group:
    """A group of the file. Its members can only be read through its methods, which check them."""

    def __init__(self, stored: StoredFile, group: Any, name: str) -> None:
        """group: reached by a hard link, or the root."""
        self.stored, self._group, self.name = stored, group, name

    def names(self) -> list[str]:
        """The names of its members, in the file's order."""
        with self.stored.reading(self.name):
            if len(self._group) > _MOST_LINKS:
                raise ValueError(f"has {len(self._group)} members")
            return list(self._group)

    def __contains__(self, name: str) -> bool:
        """Whether the group has a member of that name, of any kind."""
        with self.stored.reading(self._place(name)):
            return bool(self._group.id.links.exists(_raw(name)))

    def group(self, name: str) -> Group:
        """The subgroup of that name."""
        where = self._place(name)
        with self.stored.reading(where):
            return Group(self.stored, self._child(name, h5py.Group), where)

    def groups(self) -> list[tuple[str, Group]]:
        """All subgroups by name. Any other member means that the file is damaged."""
        return [(name, self.group(name)) for name in self.names()]

    def array(
        self, name: str, dtypes: Sequence[str], shape: Sequence[int | None] | None = None
    ) -> np.ndarray:
        """All numbers of a dataset.

        dtypes: names of those that it may have. shape: what it must have, None for any length.
        """
        return self.rows(name, dtypes, shape).read(...)

    def rows(self, name: str, dtypes: Sequence[str], shape: Sequence[int | None] | None = None) -> Rows:
        """A dataset of numbers to be read in pieces, with the same checks as `array`."""
        where = self._place(name)
        with self.stored.reading(where):
            dataset = self._child(name, h5py.Dataset)
            found = dataset.dtype
            if found.kind not in "biuf" or found.names or found.subdtype or found.name not in dtypes:
                raise ValueError(f"expected {' or '.join(dtypes)}, found {_kind(found)}")
            if dataset.shape is None:
                raise ValueError("it has no values")
            if shape is not None and not _fits(dataset.shape, shape):
                raise ValueError(f"expected shape {_shown(shape)}, found {dataset.shape}")
            _check_storage(self.stored, dataset)
            return Rows(self.stored, dataset, where)

    def text(self, name: str) -> str:
        """The text of a dataset, or of an attribute if there is no such dataset."""
        where = self._place(name)
        with self.stored.reading(where, thing="the file"):
            if name not in self and name in self._group.attrs:
                return str(self.attribute(name, str))
            dataset = self._child(name, h5py.Dataset)
            if h5py.check_string_dtype(dataset.dtype) is None or dataset.shape != ():
                raise ValueError(f"expected text, found {_kind(dataset.dtype)} of shape {dataset.shape}")
            if dataset.dtype.kind == "S" and dataset.dtype.itemsize > _LONGEST_TEXT:
                raise ValueError(f"has {dataset.dtype.itemsize:,} bytes of text")
            _check_storage(self.stored, dataset)
            raw = bytes(dataset[()])
            attributes = Group(self.stored, dataset, where)
            if (
                DIGEST in dataset.attrs
                and attributes.attribute(DIGEST, str) != hashlib.sha256(raw).hexdigest()
            ):
                raise ValueError("its text is not the one that was written: the checksum differs")
            return raw.decode("utf-8")

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object stored as a text."""
        with self.stored.reading(self._place(name), thing="the file"):
            value = parse_json(self.text(name), constants=NOT_FINITE)
            if not isinstance(value, dict):
                raise ValueError("it is no JSON object")
            return value

    def has_attribute(self, name: str) -> bool:
        """Whether the group has an attribute of that name."""
        with self.stored.reading(f"attribute {name} of {self.name or 'the root'}"):
            return name in self._group.attrs

    def attribute(self, name: str, kind: type) -> Any:
        """An attribute as a `str`, `int` or `bool`, or as a `tuple` of a few whole numbers."""
        with self.stored.reading(f"attribute {name} of {self.name or 'the root'}"):
            handle = h5py.h5a.open(self._group.id, _raw(name))
            dtype, shape = handle.dtype, handle.shape
            text = h5py.check_string_dtype(dtype) is not None
            if (
                handle.get_storage_size() > _LONGEST_ATTRIBUTE
                or math.prod(shape) * dtype.itemsize > _LONGEST_ATTRIBUTE
            ):
                raise ValueError("it is too long")
            numbers = dtype.kind in ("b" if kind is bool else "iu")
            if not (text if kind is str else numbers) or (len(shape) != 1 if kind is tuple else shape != ()):
                raise ValueError(f"expected {kind.__name__}, found {_kind(dtype)} of shape {shape}")
            value = self._group.attrs[name]
            if kind is str:
                return value.decode("utf-8") if isinstance(value, bytes) else str(value)
            return tuple(int(n) for n in value) if kind is tuple else kind(value)

    def _child(self, name: str, kind: Any) -> Any:
        if not name or "/" in name or name == ".":
            raise ValueError(f"{name!r} is no name of a member")
        raw = _raw(name)
        if not self._group.id.links.exists(raw):
            raise ValueError("it is missing")
        if self._group.id.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
            raise ValueError("it is a link to another place, and links are not followed")
        child = self._group[name]
        if not isinstance(child, kind):
            raise ValueError(f"expected a {kind.__name__.lower()}, found a {type(child).__name__.lower()}")
        if h5py.h5o.get_info(child.id).rc != 1:
            raise ValueError("several names lead to it")
        return child

    def _place(self, name: str) -> str:
        return f"{self.name}/{name}" if self.name else name


class Rows:
    """A dataset of numbers that passed the checks, read in pieces."""

    def __init__(self, stored: StoredFile, dataset: h5py.Dataset, name: str) -> None:
        """dataset: already checked."""
        self._stored, self._dataset, self.name = stored, dataset, name
        self.shape: tuple[int, ...] = tuple(dataset.shape)
        self.dtype: np.dtype = dataset.dtype
        self.attributes = Group(stored, dataset, name)

    def read(self, rows: Any) -> np.ndarray:
        """Some rows (a slice) or all (...) as numbers. HDF5 compares checksums as it reads."""
        with self._stored.reading(self.name):
            values: np.ndarray = np.asarray(self._dataset[rows])
            values = values.astype(values.dtype.newbyteorder("="), copy=False)
            if rows is ... and values.dtype.kind == "f" and self._stored.is_checked:
                self._check_finite(values)
            return values

    def _check_finite(self, values: np.ndarray) -> None:
        """Raise ValueError if the number of values that are not finite differs from the number at writing."""
        found = int(values.size - np.isfinite(values).sum())
        written = self.attributes.attribute(NON_FINITE, int) if NON_FINITE in self._dataset.attrs else 0
        if found != written:
            raise ValueError(f"{found} values are not finite, and {written} were when it was written")


def _check_storage(stored: StoredFile, dataset: h5py.Dataset) -> None:
    """Raise ValueError unless all bytes of a dataset are in this file, stored as peel writes them."""
    made = dataset.id.get_create_plist()
    layout = made.get_layout()
    if layout not in _LAYOUTS:
        raise ValueError("it is a virtual dataset, whose values lie elsewhere")
    if made.get_external_count():
        raise ValueError("its values lie in another file")
    filters = [made.get_filter(i)[0] for i in range(made.get_nfilters())]
    if set(filters) - {h5py.h5z.FILTER_FLETCHER32} or len(filters) > 1:
        raise ValueError(f"it is stored through filters {filters} that peel does not use")
    nbytes, held = math.prod(dataset.shape) * dataset.dtype.itemsize, dataset.id.get_storage_size()
    if nbytes > held:
        raise ValueError(f"it should have {nbytes:,} bytes, and the file holds {held:,} of it")
    if layout == h5py.h5d.CHUNKED and nbytes:
        _check_chunks(dataset, 4 * len(filters), os.stat(stored.path).st_size)
    stored.claim(h5py.h5o.get_info(dataset.id).addr, held)


def _check_chunks(dataset: h5py.Dataset, checksum_nbytes: int, file_nbytes: int) -> None:
    """Raise ValueError unless each chunk exists once, has the usual size and lies in the file: a gap reads as zeros."""
    chunk, shape = dataset.chunks, dataset.shape
    expected = math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
    if expected > _MOST_CHUNKS or dataset.id.get_num_chunks() != expected:
        raise ValueError(
            f"it should have {expected} chunks, and the file holds {dataset.id.get_num_chunks()}"
        )
    nbytes = math.prod(chunk) * dataset.dtype.itemsize + checksum_nbytes
    places, sound = set(), True

    def look(info: Any) -> None:
        nonlocal sound
        inside = all(at % c == 0 and at < n for at, c, n in zip(info.chunk_offset, chunk, shape, strict=True))
        within = info.byte_offset is not None and info.byte_offset + info.size <= file_nbytes
        sound = sound and inside and within and info.size == nbytes and info.filter_mask == 0
        places.add(info.chunk_offset)

    dataset.id.chunk_iter(look)
    if not sound or len(places) != expected:
        raise ValueError("its chunks are not those that were written")


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w is None or n == w for n, w in zip(shape, wanted, strict=True))


def _shown(shape: Sequence[int | None]) -> str:
    return f"({', '.join('any' if n is None else str(n) for n in shape)})"


def _kind(dtype: np.dtype) -> str:
    return "text" if h5py.check_string_dtype(dtype) is not None else dtype.name
