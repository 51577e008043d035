"""Common parts of all HDF5 files of peel: a schema with a version, checksums, and JSON attributes. No torch.

Everything written has a checksum. HDF5 1.10's format protects the file's structure and short attributes, arrays use
HDF5's `fletcher32` filter, and texts have their SHA-256 in an attribute. The attribute `non_finite` counts an array's
values that are not finite, so that damage cannot add one unnoticed. Files of older versions of peel have no checksums
(the root attribute `checked` is missing) and are still read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from peelcli import __version__
from peelcli.errors import ArtefactError
from peelcli.storage.hdf5_reader import CHECKED, DIGEST, NON_FINITE, Group, Rows, StoredFile

_LIBVER = ("v110", "v110")  # the format in which all structure carries checksums
_CHUNK_NBYTES = 2**20
_COMMANDS = {"peel/activations": "peel extract"}


def open_h5(path: Path, schema: str, version: int) -> StoredFile:
    """Open one of peel's files for reading. Raises ArtefactError if it is missing, damaged, or of another schema."""
    if path.is_dir():
        raise ArtefactError(
            f"{path}: a directory. Name the file in it: `peel extract` and `peel fit` print its path, and an audit "
            "leaves it in its --output."
        )
    if path.exists() and not path.is_file():
        raise ArtefactError(
            f"{path}: a device or a pipe, expected a regular file. Name a file that peel wrote."
        )
    if not path.is_file():
        raise ArtefactError(
            f"{path}: no such file. Write it first: `peel extract` makes activations, `peel fit` a fit."
        )
    stored = open_plain(path, _COMMANDS.get(schema, "peel fit"))
    try:
        _require_schema(stored, schema, version)
    except BaseException:
        stored.close()
        raise
    return stored


def open_plain(path: Path, command: str = "peel fit") -> StoredFile:
    """Open an HDF5 file of any schema for reading. command: the command that makes such a file, for messages."""
    try:
        file = h5py.File(path, "r")
    except BlockingIOError as error:
        raise ArtefactError(
            f"{path}: another process holds the file locked ({error}). Wait for it to end, or set "
            "HDF5_USE_FILE_LOCKING=FALSE if the file system does not support locks."
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, SystemError) as error:
        raise ArtefactError(
            f"{path}: not a whole HDF5 file: {error}. It is truncated or something else; delete it and make it anew."
        ) from error
    try:
        return StoredFile(path, file, command)
    except BaseException:
        file.close()
        raise


def _require_schema(stored: StoredFile, schema: str, version: int) -> None:
    root = stored.root
    found = root.attribute("schema", str) if root.has_attribute("schema") else None
    if found != schema:
        raise ArtefactError(
            f"{stored.path}: expected a file of schema {schema}, found {found!r}. Check the order of arguments."
        )
    at = root.attribute("schema_version", int)
    if at > version:
        raise ArtefactError(
            f"{stored.path}: schema version {at} is newer than {version}, the newest that peel {__version__} reads. "
            "Upgrade."
        )
    if at < 1:
        raise ArtefactError(
            f"{stored.path}: has schema version {at}, and there is none below 1. Make it anew."
        )


def create_h5(target: Any) -> h5py.File:
    """A new, empty HDF5 file in the format with checksums. target: the path or file object to write to."""
    file = h5py.File(target, "w", libver=_LIBVER)
    file.attrs[CHECKED] = True
    return file


def write_root(
    file: h5py.File, schema: str, version: int, about: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Write the root attributes that every finished file of peel has."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    file.attrs["schema_version"], file.attrs["seed"] = version, int(about["seed"])
    put_attribute(file, "schema", schema)
    put_attribute(file, "peel_version", __version__)
    put_attribute(file, "checkpoint_id", str(about["checkpoint_id"]))
    put_attribute(file, "created", created)
    put_text(file, "config", json.dumps(config, sort_keys=True))
    put_text(file, "about", json.dumps(about, sort_keys=True))


def put_array(group: h5py.Group, name: str, values: np.ndarray) -> h5py.Dataset:
    """Store numbers with checksums, and how many of them are not finite."""
    # A dataset without values, or of a single one without axes, has no chunks to bear a checksum.
    if values.size and values.ndim:
        chunks = _chunks(values.shape, values.dtype.itemsize)
        dataset = group.create_dataset(name, data=values, chunks=chunks, fletcher32=True)
    else:
        dataset = group.create_dataset(name, data=values)
    note_non_finite(dataset, values)
    return dataset


def note_non_finite(dataset: h5py.Dataset, values: np.ndarray) -> None:
    """Keep how many of the values of a dataset are not finite, where any are: a reader counts them again."""
    count = int(values.size - np.isfinite(values).sum()) if values.dtype.kind == "f" else 0
    if count:
        dataset.attrs[NON_FINITE] = count


def put_text(group: h5py.Group, name: str, text: str) -> None:
    """Store a text with its SHA-256. A dataset, not an attribute: an attribute holds at most 64 KiB."""
    raw = text.encode("utf-8")
    # Of fixed length: what HDF5 stores of varying length lies in a heap without checksums.
    kind = h5py.string_dtype("utf-8", max(1, len(raw)))
    dataset = group.create_dataset(name, data=np.array(raw, dtype=kind), dtype=kind)
    put_attribute(dataset, DIGEST, hashlib.sha256(raw).hexdigest())


def put_attribute(target: h5py.Group | h5py.Dataset, name: str, text: str) -> None:
    """Store a short text as an attribute, within the structure that HDF5 keeps a checksum of."""
    raw = text.encode("utf-8")
    kind = h5py.string_dtype("utf-8", max(1, len(raw)))
    target.attrs.create(name, np.array(raw, dtype=kind), dtype=kind)


def require_ids(ids: np.ndarray, vocab_size: int, seq_len: int) -> None:
    """ValueError unless `ids` (n_seq, seq_len) are tokens of the vocabulary."""
    if ids.shape[1] != seq_len:
        raise ValueError(f"expected sequences of {seq_len} tokens, found {ids.shape[1]}")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"expected ids from 0 to {vocab_size - 1}, found {ids.min()} to {ids.max()}")


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Chunks of about 1 MiB: whole last axes, as many of the others as fit, all of about the same size."""
    left, chunks = _CHUNK_NBYTES // itemsize, []
    for size in reversed(shape):
        count = -(-size // max(1, min(size, left)))
        chunks.append(-(-size // count))
        left //= chunks[-1]
    return tuple(reversed(chunks))


__all__ = [
    "Group",
    "Rows",
    "StoredFile",
    "create_h5",
    "note_non_finite",
    "open_h5",
    "open_plain",
    "put_array",
    "put_attribute",
    "put_text",
    "require_ids",
    "write_root",
]
