"""Mutations of peel's HDF5 files: bytes changed at random, and structure changed as only HDF5 itself can.

`mutate(source, target, rng)` writes one mutation and names it. The same seed of `rng` makes the same mutation.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

HOSTILE_JSON: tuple[Any, ...] = (
    None, True, 0, -1, 10**9, 10**30, 1e308, float("nan"), float("inf"), -float("inf"), "", "x" * 5000,
    "\x1b[31m\n::error::x",
    "é\ud800", [], {}, [[]], [None], {"a": 1}, [0] * 1000, -(2**63), "1" * 400,
)  # fmt: skip
HOSTILE_NUMBERS = (np.nan, np.inf, -np.inf, -1.0, 0.0, 1e308, -1e308, 1e-320)


def mutate(source: Path, target: Path, rng: random.Random) -> str:
    """Write a mutation of the file `source` to `target`; returns what it is."""
    if rng.random() < 0.2:
        turn = rng.choice(BYTES)
        target.write_bytes(turn(source.read_bytes(), rng))
        return turn.__name__
    change = rng.choice(STRUCTURE)
    target.write_bytes(source.read_bytes())
    with h5py.File(target, "r+") as file:
        where = change(file, rng)
    return f"{change.__name__} {where}"


# -- bytes -------------------------------------------------------------------------------------------------------------


def flip(data: bytes, rng: random.Random) -> bytes:
    """A few bits turned, near the start as often as anywhere."""
    changed = bytearray(data)
    most = rng.choice((512, 8192, len(data)))
    for _ in range(rng.choice((1, 1, 4, 64))):
        changed[rng.randrange(min(most, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A stretch of zeros, ones or noise."""
    at, length = rng.randrange(len(data)), rng.choice((1, 4, 8, 64, 4096))
    noise = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return data[:at] + noise[: len(data) - at] + data[at + length :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    """The first part of it."""
    return data[: rng.randrange(len(data))]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A stretch of it over another, or between two bytes."""
    at, start, length = (rng.randrange(len(data)) for _ in range(3))
    part = data[start : start + length % 8192]
    return data[:at] + part + data[at + rng.choice((0, len(part))) :]


# -- structure ---------------------------------------------------------------------------------------------------------


def _paths(file: h5py.File, kind: Any = (h5py.Dataset, h5py.Group)) -> list[str]:
    found: list[str] = []
    file.visititems(lambda name, value: found.append(name) if isinstance(value, kind) else None)
    return found


def _anything(rng: random.Random) -> Any:
    """Something that a dataset or an attribute could be, and that peel does not write."""
    return rng.choice(
        (
            0, -1, 2**62, 1.5, True, "text", b"\xff\xfe", "{", "[]", "NaN", "[" * 5000, "{}", h5py.Empty("f4"),
            np.zeros(0), np.zeros((2, 3, 4)), np.zeros(7, np.complex64), np.zeros(3, np.uint8), np.array([b"a", b"b"]),
            np.zeros(2, [("a", "i4"), ("b", "f8")]), np.full(4, np.nan),
            np.array(["x"] * 3, object), np.zeros(5, ">f8"),
        )
    )  # fmt: skip


def delete(file: h5py.File, rng: random.Random) -> str:
    """A dataset, a group or an attribute gone."""
    name = rng.choice(_paths(file))
    if file[name].attrs and rng.random() < 0.5:
        attribute = rng.choice(list(file[name].attrs))
        del file[name].attrs[attribute]
        return f"{name}@{attribute}"
    del file[name]
    return name


def replace(file: h5py.File, rng: random.Random) -> str:
    """Another dataset, or a group, in the place of one."""
    name, value = rng.choice(_paths(file)), _anything(rng)
    del file[name]
    if rng.random() < 0.1:
        file.create_group(name)
        return f"{name} group"
    file[name] = value
    return f"{name} {value!r:.60}"


def reshape(file: h5py.File, rng: random.Random) -> str:
    """A dataset of another length, or of another type."""
    name = rng.choice(_paths(file, h5py.Dataset))
    values = np.asarray(file[name][()])
    del file[name]
    if rng.random() < 0.5 or values.dtype.kind not in "iuf":
        flat = values.reshape(-1)
        values = rng.choice((flat[:-1], flat[:1], np.concatenate([flat, flat]), values[None]))
    else:
        values = values.astype(rng.choice(("f4", "f2", "i8", "u1", ">f8", "i4", "f8")))
    file[name] = values
    return f"{name} {values.dtype} {values.shape}"


def set_values(file: h5py.File, rng: random.Random) -> str:
    """Numbers that cannot be, with right checksums."""
    name = rng.choice([n for n in _paths(file, h5py.Dataset) if file[n].dtype.kind in "iuf" and file[n].size])
    value: Any = (
        rng.choice(HOSTILE_NUMBERS) if file[name].dtype.kind == "f" else rng.choice((-1, 0, 127, 2**31 - 1))
    )
    values = np.array(file[name])
    with np.errstate(all="ignore"):
        value = np.array(value).astype(values.dtype)
    values.reshape(-1)[:: rng.choice((1, 3, values.size))] = value
    file[name][...] = values
    return f"{name} {value}"


def retag(file: h5py.File, rng: random.Random) -> str:
    """An attribute of another value."""
    name = rng.choice([n for n in ("/", *_paths(file)) if file[n].attrs])
    attribute, value = rng.choice(list(file[name].attrs)), _anything(rng)
    file[name].attrs[attribute] = value
    return f"{name}@{attribute} {value!r:.60}"


def edit_json(file: h5py.File, rng: random.Random) -> str:
    """One value of one JSON text exchanged, with the checksum left out."""
    texts = [
        (n, "") for n in _paths(file, h5py.Dataset) if file[n].shape == () and file[n].dtype.kind in "SO"
    ]
    texts += [(n, a) for n in _paths(file, h5py.Group) for a in ("reference", "fit") if a in file[n].attrs]
    name, attribute = rng.choice(texts)
    value = json.loads(file[name].attrs[attribute] if attribute else file[name][()])
    where = exchange(value, rng)
    raw = json.dumps(value)
    if attribute:
        file[name].attrs[attribute] = raw
    else:
        del file[name]
        file[name] = raw
    return f"{name}{'@' + attribute if attribute else ''}{where}"


def exchange(value: Any, rng: random.Random) -> str:
    """Put something hostile into the place of a value somewhere in `value`; returns where and what."""
    where = ""
    while True:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value))) if value else None
        if key is None:
            return where
        where += f".{key}"
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.7:
            value = value[key]
            continue
        if isinstance(value, dict) and rng.random() < 0.15:
            del value[key]
            return f"{where} deleted"
        value[key] = rng.choice(HOSTILE_JSON)
        return f"{where} = {value[key]!r:.40}"


def link(file: h5py.File, rng: random.Random) -> str:
    """A link to another place, or to another file, in the place of something."""
    names = _paths(file)
    name, other = rng.choice(names), rng.choice(names)
    kind = rng.choice(("soft", "dangling", "external", "hard", "circle"))
    if kind in ("hard", "circle"):
        other_object = file if kind == "circle" else file[other]
        if name != other and not name.startswith(other + "/"):
            del file[name]
            if other in file or kind == "circle":
                file[name] = other_object
        return f"{name} {kind} {other}"
    del file[name]
    file[name] = {
        "soft": h5py.SoftLink(f"/{other}"),
        "dangling": h5py.SoftLink("/nowhere"),
        "external": h5py.ExternalLink(file.filename, other),
    }[kind]
    return f"{name} {kind} {other}"


def store_elsewhere(file: h5py.File, rng: random.Random) -> str:
    """A dataset whose values lie in another file, or nowhere, or behind a filter."""
    name = rng.choice([n for n in _paths(file, h5py.Dataset) if file[n].dtype.kind in "iuf" and file[n].ndim])
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    kind = rng.choice(("external", "virtual", "nowhere", "huge", "gzip"))
    if kind == "external":
        file.create_dataset(name, shape, dtype, external=[(__file__, 0, h5py.h5f.UNLIMITED)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout(shape, dtype)
        layout[...] = h5py.VirtualSource(file.filename, "ids" if "ids" in file else "ids_eval", shape)
        file.create_virtual_dataset(name, layout)
    elif kind == "nowhere":
        file.create_dataset(
            name, shape, dtype, chunks=tuple(max(1, n // 2) for n in shape) if 0 not in shape else None
        )
    elif kind == "huge":
        file.create_dataset(name, (6 * 2**30, *shape[1:]), dtype, chunks=True)
    else:
        file.create_dataset(name, data=np.zeros((2**16, *shape[1:]), dtype), compression="gzip")
    return f"{name} {kind}"


BYTES: list[Callable[[bytes, random.Random], bytes]] = [flip, overwrite, truncate, splice]
STRUCTURE: list[Callable[[h5py.File, random.Random], str]] = [
    delete, replace, reshape, set_values, retag, edit_json, edit_json, link, store_elsewhere,
]  # fmt: skip


def as_before(source: Path, target: Path) -> None:
    """Write the same values as peel 0.1.0 did: without checksums, in HDF5's oldest format, texts of varying length."""
    with h5py.File(source, "r") as old, h5py.File(target, "w") as new:
        _copy(old, new)
        new.attrs["config"] = _text(old["config"][()])
        del new["config"]
        new.attrs["schema_version"] = 1
        new.attrs.pop("checked")


def _copy(old: h5py.Group, new: h5py.Group) -> None:
    for name, value in old.attrs.items():
        if name not in ("sha256", "non_finite", "DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME"):
            new.attrs[name] = _text(value)
    for name, value in old.items():
        if isinstance(value, h5py.Group):
            _copy(value, new.create_group(name, track_order=True))
        else:
            copy = new.create_dataset(name, data=_text(value[()]))
            if "torch_dtype" in value.attrs:
                copy.attrs["torch_dtype"] = _text(value.attrs["torch_dtype"])


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
