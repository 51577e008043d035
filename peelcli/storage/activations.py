"""The HDF5 file of trained states: the only place that knows its layout.

    /ids             (n_seq, seq_len) int32       rows in the order fit, select, eval
    /states/003      (n_seq, seq_len, d_model)    O_3; float32, float16, or bfloat16 as uint16 with `torch_dtype`
    /nll, /entropy   (n_seq,) float64             of the trained model, nats per token, mean over each sequence

Root attributes: schema, schema_version, peel_version, checkpoint_id, config (JSON), seed, created, and `about` (JSON),
which holds what a report needs to know of the checkpoint. While it grows, the file is `NAME.partial`, with every
dataset allocated beforehand so that its structure never changes again, and `NAME.partial.journal` says which layers
are whole: a process killed at any moment leaves a file that the next one goes on with.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from peelcli import __version__
from peelcli.errors import ArtefactError, ResourceError
from peelcli.records import Run
from peelcli.records.check_run import UNBOUNDED, check_about, check_network
from peelcli.records.from_json import from_json
from peelcli.runtime import durable
from peelcli.storage.disk_full import DiskFullWriter
from peelcli.storage.hdf5 import (
    create_h5,
    note_non_finite,
    open_h5,
    put_array,
    put_attribute,
    require_ids,
    write_root,
)
from peelcli.storage.hdf5_reader import Group, Rows

SCHEMA, SCHEMA_VERSION = "peel/activations", 2  # 1: without checksums
# What h5py is seen to raise on a damaged file.
_DAMAGE = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, MemoryError)
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def states_nbytes(num_states: int, n_seq: int, seq_len: int, d_model: int, dtype: str) -> int:
    """Bytes on disk of `num_states` trained states (n_seq, seq_len, d_model), stored in `dtype`."""
    return num_states * n_seq * seq_len * d_model * np.dtype(_NUMPY[dtype]).itemsize


def require_space(path: Path, nbytes: int, what: str) -> None:
    """Raise ResourceError if the disk of `path` has less than `nbytes` free. what: what will be written."""
    free = shutil.disk_usage(path).free
    if nbytes > free:
        raise ResourceError(
            f"{path}: {what} needs {nbytes / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free. Put the work directory on "
            "another disk with --output, or lower --tokens, --layers or --store-dtype bfloat16."
        )


def _check_of(key: str, layer: str, checksum: str) -> str:
    """The checksum at the end of a journal line, by which a damaged line is recognised."""
    return str(zlib.crc32(f"{key} {layer} {checksum}".encode()))


def _plain(value: Any) -> Any:
    """A value read by h5py, with bytes decoded to text."""
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _to_stored(states: Tensor, dtype: str) -> np.ndarray:
    states = states.detach().cpu()
    if dtype == "bfloat16":
        return states.to(torch.bfloat16).view(torch.uint16).numpy()
    return states.to(getattr(torch, dtype)).numpy()


def _from_stored(values: np.ndarray, dtype: str) -> Tensor:
    stored = torch.from_numpy(values)
    return stored.view(torch.bfloat16) if dtype == "bfloat16" else stored


class ActivationWriter:
    """Writes trained states layer by layer to a partial file; `finish` gives it its final name."""

    def __init__(
        self,
        path: Path,
        *,
        about: Mapping[str, Any],
        config: Mapping[str, Any],
        ids: np.ndarray,
        stored: Sequence[int],
        d_model: int,
        dtype: str,
        resume: bool = True,
    ) -> None:
        """Start a new file, or resume the partial file of an interrupted run with the same `about` and `config`.

        ids: (n_seq, seq_len). stored: the layers l whose states O_l the file will hold. dtype: of the stored states.
        """
        self.path, self.dtype = path, dtype
        self._partial = path.with_name(path.name + ".partial")
        self._journal = path.with_name(path.name + ".partial.journal")
        key = {"about": about, "config": config, "stored": list(stored), "dtype": dtype}
        self._key = json.dumps(key, sort_keys=True)
        self._about, self._config = (json.dumps(value, sort_keys=True) for value in (about, config))
        self._file: Any = None
        self._resumed = False
        self._checksums: dict[int, int] = {}  # of the bytes of each state that is whole
        self._running = 0  # of the state that is being written
        shape = (*ids.shape, d_model)
        if resume and self._goes_on(ids, stored, shape):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        n_seq, seq_len, _ = shape
        require_space(
            path.parent, states_nbytes(len(stored), n_seq, seq_len, d_model, dtype), "the trained states"
        )
        self._sink = DiskFullWriter(self._partial, new=True)  # from here on it is ours
        self._journal.unlink(missing_ok=True)
        durable.sync_directory(path.parent)
        self._file = create_h5(self._sink)
        try:
            write_root(self._file, SCHEMA, SCHEMA_VERSION, about, config)
            put_array(self._file, "ids", ids.astype(np.int32))
            for name in ("nll", "entropy"):
                put_array(self._file, name, np.zeros(n_seq))
            self._allocate(stored, (n_seq, seq_len, d_model))
            self._file.flush()
            self._sink.check()
        except BaseException:
            self.discard()
            raise

    def _allocate(self, stored: Sequence[int], shape: tuple[int, int, int]) -> None:
        scales = self._file.create_group("scales")
        for name, size in zip(("sequence", "position", "feature"), shape, strict=True):
            scales.create_dataset(name, data=np.arange(size, dtype=np.int32)).make_scale(name)
        group = self._file.create_group("states")
        for layer in stored:
            create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            create.set_chunk((1, shape[1], shape[2]))
            create.set_fletcher32()
            # Filled at once: a chunk without its checksum is shorter, and would be moved when it is written.
            create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            create.set_fill_time(h5py.h5d.FILL_TIME_ALLOC)
            kind = h5py.h5t.py_create(np.dtype(_NUMPY[self.dtype]))
            h5py.h5d.create(group.id, f"{layer:03d}".encode(), kind, h5py.h5s.create_simple(shape), create)
            dataset = group[f"{layer:03d}"]
            put_attribute(dataset, "torch_dtype", self.dtype)
            for axis, name in enumerate(("sequence", "position", "feature")):
                dataset.dims[axis].attach_scale(scales[name])

    @property
    def finished(self) -> set[int]:
        """The layers whose states are completely written."""
        return set(self._checksums)

    def _goes_on(self, ids: np.ndarray, stored: Sequence[int], shape: tuple[int, ...]) -> bool:
        """Whether an interrupted run of the same work left complete states; a damaged file is started again."""
        checksums = self._read_journal()
        if not (checksums and self._partial.exists()):
            return False
        self._sink = DiskFullWriter(self._partial, new=False)
        try:
            self._file = h5py.File(self._sink, "r+")
            whole = self._is_as_made(ids, stored, shape)
            self._resumed = whole and self._is_whole(checksums)
        except _DAMAGE:
            self._resumed = False  # it is written anew
        if self._resumed:
            self._checksums = checksums
            return True
        with contextlib.suppress(*_DAMAGE):
            self.close()
        self._sink.close()
        return False

    def _is_as_made(self, ids: np.ndarray, stored: Sequence[int], shape: tuple[int, ...]) -> bool:
        """Whether everything in the partial file except the states equals what this run would write."""
        file, about = self._file, json.loads(self._about)
        root = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "peel_version": __version__}
        root |= {"checkpoint_id": str(about["checkpoint_id"]), "seed": int(about["seed"])}
        states = {f"{layer:03d}" for layer in stored}
        return (
            all(_plain(file.attrs[name]) == value for name, value in root.items())
            and _plain(file["config"][()]) == self._config
            and _plain(file["about"][()]) == self._about
            and np.array_equal(file["ids"][...], ids)
            and file["nll"].shape == file["entropy"].shape == (len(ids),)
            and set(file["states"]) == states
            and all(file["states"][n].shape == shape for n in states)
            and all(file["states"][n].dtype == _NUMPY[self.dtype] for n in states)
            and all(_plain(file["states"][n].attrs["torch_dtype"]) == self.dtype for n in states)
        )

    def _read_journal(self) -> dict[int, int]:
        """Layer → checksum of its completely written states. Damaged lines of the journal are ignored."""
        try:
            lines = self._journal.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return {}
        if not lines or lines[0] != self._key:
            return {}
        records = (line.split() for line in lines[1:])
        whole = [r for r in records if len(r) == 3 and r[2] == _check_of(self._key, *r[:2])]
        return {int(layer): int(checksum) for layer, checksum, _ in whole}

    def _is_whole(self, checksums: Mapping[int, int]) -> bool:
        """Whether the states in the file match these checksums."""
        try:
            return all(self._checksum_of(layer) == known for layer, known in checksums.items())
        except _DAMAGE:  # HDF5 keeps checksums of its own
            return False

    def _checksum_of(self, layer: int) -> int:
        """The CRC-32 of one layer's states in the file."""
        dataset, checksum = self._file[f"states/{layer:03d}"], 0
        for row in range(len(dataset)):
            checksum = zlib.crc32(dataset[row].data, checksum)
        return checksum

    def write(self, layer: int, start: int, states: Tensor) -> None:
        """Store O_layer of the rows from `start` on; states: (n_rows, seq_len, d_model)."""
        stored = _to_stored(states, self.dtype)
        self._file[f"states/{layer:03d}"][start : start + len(states)] = stored
        self._running = zlib.crc32(np.ascontiguousarray(stored).data, self._running if start else 0)
        self._sink.check()

    def read(self, layer: int, rows: slice) -> Tensor:
        """States written earlier, (n_rows, seq_len, d_model): the next layer's input when a run is resumed."""
        return _from_stored(self._file[f"states/{layer:03d}"][rows], self.dtype)

    def finish_layer(self, layer: int) -> None:
        """Mark O_layer as complete, after all its rows were written in order. Syncs the states before the journal."""
        self._file.flush()
        self._sink.sync()
        new = not self._journal.exists()
        checksum = str(self._running)
        line = f"{layer} {checksum} {_check_of(self._key, str(layer), checksum)}\n"
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(f"{self._key}\n{line}" if new else f"\n{line}")
            journal.flush()
            durable.sync(journal.fileno())
        if new:
            durable.sync_directory(self.path.parent)
        self._checksums[layer] = self._running

    def finish(self, nll: np.ndarray, entropy: np.ndarray) -> None:
        """Store the trained model's losses and entropies, both (n_seq,), and give the file its final name."""
        if self._resumed and not self._is_whole(self._checksums):
            self.discard()
            raise ArtefactError(
                f"{self._partial}: what an interrupted run left was damaged and is deleted. Run the command again."
            )
        for name, values in (("nll", nll), ("entropy", entropy)):
            self._file[name][...] = values
            note_non_finite(self._file[name], values)
        self._file.close()
        self._sink.take_name(self.path)
        self._sink.close()
        self._journal.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file in any state; a later run can resume it."""
        if self._file:
            self._file.close()
        self._sink.close()

    def discard(self) -> None:
        """Delete the partial file and its journal, so that nothing can be resumed."""
        if self._file:
            self._file.close()
        self._sink.delete()
        self._sink.close()
        self._journal.unlink(missing_ok=True)


class ActivationFile:
    """Trained states, read a few rows at a time."""

    def __init__(self, path: Path) -> None:
        """Open `path`. Raises ArtefactError if it is not a complete file of this schema."""
        self.path = path
        self._file = open_h5(path, SCHEMA, SCHEMA_VERSION)
        try:
            self._read(self._file.root)
        except BaseException:
            self._file.close()
            raise

    def _read(self, root: Group) -> None:
        self.about, self.config = root.json("about"), root.json("config")
        with self._file.reading("about"):
            run = from_json(Run, self.about, unbounded=UNBOUNDED)
            check_network(run)
            check_about(self.about, run)
        sizes = [self.about["rows"][part] for part in ("fit", "select", "eval")]
        ids = root.array("ids", ("int32",), (sum(sizes), run.seq_len))
        with self._file.reading("ids"):
            require_ids(ids, run.vocab_size, run.seq_len)
        self.ids = torch.from_numpy(ids.astype(np.int64))
        self.nll, self.entropy = (root.array(name, ("float64",), (len(ids),)) for name in ("nll", "entropy"))
        states = root.group("states")
        self._states = {
            _layer(states, name, run.num_layers): _states(states, name) for name in states.names()
        }
        self.stored = sorted(self._states)
        with self._file.reading("states"):
            if not self._states or len({rows.shape for rows, _ in self._states.values()}) != 1:
                raise ValueError("the states of all layers should have the same shape")
            (shape,) = {rows.shape for rows, _ in self._states.values()}
            if shape[:2] != ids.shape:
                raise ValueError(f"expected states of {ids.shape} tokens, found {shape}")
        self.d_model = shape[2]
        ends = np.cumsum(sizes).tolist()
        self.rows = {
            part: slice(end - size, end)
            for part, size, end in zip(("fit", "select", "eval"), sizes, ends, strict=True)
        }

    def states(self, layer: int, rows: slice) -> Tensor:
        """O_layer of `rows`, (n_rows, seq_len, d_model), in the stored dtype. Raises ArtefactError if it is missing."""
        if layer not in self._states:
            raise ArtefactError(
                f"{self.path}: the states of layer {layer} are not in this file, which holds {self.stored}. "
                "Extract again without --layers, or with the layers you want to fit."
            )
        stored, dtype = self._states[layer]
        found = _from_stored(stored.read(rows), dtype)
        if not torch.isfinite(found).all():
            raise ArtefactError(
                f"{self.path}: the states of layer {layer} are not finite, and those of an extraction are: the file is "
                f"damaged, or {dtype} cannot hold them. Extract again, with --store-dtype float32."
            )
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _layer(states: Group, name: str, num_layers: int) -> int:
    with states.stored.reading("states"):
        if not (name.isascii() and name.isdigit() and name == f"{int(name):03d}" and int(name) <= num_layers):
            raise ValueError(f"expected layers 000 to {num_layers:03d}, found {name!r}")
        return int(name)


def _states(states: Group, name: str) -> tuple[Rows, str]:
    """The states of a layer and the name of their torch dtype."""
    rows = states.rows(name, ("float32", "float16", "uint16"), (None, None, None))
    dtype = rows.attributes.attribute("torch_dtype", str)
    with states.stored.reading(rows.name):
        if dtype not in _NUMPY or rows.dtype != _NUMPY[dtype]:
            raise ValueError(f"expected {dtype}, found {rows.dtype}")
    return rows, dtype
