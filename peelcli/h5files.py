"""What all HDF5 files of peel's have in common: a schema with a version, and JSON about what they hold. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from peelcli import __version__
from peelcli.errors import ArtefactError


def open_h5(path: Path, schema: str, version: int) -> h5py.File:
    """Open one of peel's files for reading, or say in words why it cannot be."""
    if path.is_dir():
        raise ArtefactError(
            f"{path}: a directory. Name the file in it: `peel extract` and `peel fit` print its path, and an audit "
            "leaves it in its --output."
        )
    if not path.is_file():
        raise ArtefactError(
            f"{path}: no such file. Write it first: `peel extract` makes activations, `peel fit` a fit."
        )
    try:
        file = h5py.File(path, "r")
    except BlockingIOError as error:
        raise ArtefactError(
            f"{path}: another process holds the file locked ({error}). Wait for it to end, or set "
            "HDF5_USE_FILE_LOCKING=FALSE if the file system does not support locks."
        ) from error
    except OSError as error:
        raise ArtefactError(
            f"{path}: not a whole HDF5 file: {error}. It is truncated or something else; delete it and make it anew."
        ) from error
    found, at = file.attrs.get("schema"), file.attrs.get("schema_version")
    if found != schema:
        file.close()
        raise ArtefactError(
            f"{path}: expected a file of schema {schema}, found {found!r}. Check the order of arguments."
        )
    if not isinstance(at, (int, np.integer)) or int(at) > version:
        file.close()
        raise ArtefactError(
            f"{path}: schema version {at} is newer than {version}, the newest that peel {__version__} reads. Upgrade."
        )
    return file


def write_root(
    file: h5py.File, schema: str, version: int, about: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """The root attributes that every file of peel's carries."""
    file.attrs["schema"], file.attrs["schema_version"] = schema, version
    file.attrs["peel_version"], file.attrs["checkpoint_id"] = __version__, str(about["checkpoint_id"])
    file.attrs["seed"] = int(about["seed"])
    file.attrs["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    file.attrs["config"] = json.dumps(config, sort_keys=True)
    # A dataset, not an attribute: an attribute holds at most 64 KiB.
    file.create_dataset("about", data=json.dumps(about, sort_keys=True))


def read_json(file: h5py.File, name: str) -> dict[str, Any]:
    """A JSON object stored in the file, as `about` or the attribute `config`."""
    try:
        raw = file.attrs[name] if name in file.attrs else file[name][()]
        value = json.loads(raw)
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ArtefactError(
            f"{file.filename}: {name!r} is missing or damaged ({error}); make the file anew."
        ) from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{file.filename}: {name!r} should be a JSON object; make the file anew.")
    return value
