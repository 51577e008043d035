"""Unpack a packed checkpoint once into a plain checkpoint in a directory of its own, which is then opened as usual.

One weight is in memory at a time. The directory gets its final name once it is complete. The name is a hash of the
source files' stamp, so that the directory is never used for other files. A JSON file in it says how the weights were
quantised.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peelcli import __version__
from peelcli.checkpoint.files import CheckpointFiles, open_checkpoint, read_tensor
from peelcli.checkpoint.layers import group_by_layer
from peelcli.checkpoint.offload import PrivateDirectory
from peelcli.checkpoint.packed.codes import PackedWeight, Packing, dequantize, describe
from peelcli.checkpoint.stamp import Stamp
from peelcli.errors import ArtefactError, CheckpointError, ResourceError
from peelcli.records import QuantizedModule
from peelcli.runtime import durable

_SHARD_NBYTES = 2**28  # bytes of a shard, which is in memory until it is written
_FOUND = "quantized_modules.json"


def unpack(files: CheckpointFiles, packing: Packing, dtype: torch.dtype, offload_dir: Path) -> Path:
    """The directory of the plain checkpoint, in `dtype`, below `offload_dir`. It is made if it does not exist yet.

    Raises CheckpointError if a weight cannot be unpacked, and ResourceError if the disk has too little room.
    """
    stamp = Stamp.of(files.directory).restricted(files.files)
    key = json.dumps([__version__, str(dtype), stamp.key])
    directory = offload_dir / f"plain-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if _is_whole(directory):
        return directory
    own = PrivateDirectory(offload_dir)
    try:
        with stamp.watched():
            _require_room(files, packing, dtype, own.path)
            _write(files, packing, dtype, own.path)
            stamp.require_unchanged()
        durable.sync_tree(own.path)
        if not _is_whole(directory):  # otherwise another process has made it meanwhile
            shutil.rmtree(directory, ignore_errors=True)
            durable.take_name(own.path, directory)
    finally:
        own.delete()
    return directory


def _is_whole(directory: Path) -> bool:
    """Whether the directory holds a completely unpacked checkpoint."""
    try:
        open_checkpoint(directory)
        quantized_modules(directory)
    except (CheckpointError, ArtefactError, OSError):
        return False
    return True


def quantized_modules(directory: Path) -> tuple[QuantizedModule, ...]:
    """How the weights of `directory` were quantised before unpacking. Raises ArtefactError if the record is damaged."""
    path = directory / _FOUND
    try:
        return tuple(QuantizedModule(**one) for one in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ArtefactError(f"{path}: damaged ({error}); delete its directory.") from error


def plain_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json of the same model with plain weights in `dtype`."""
    quantised = ("quantization_config", "compression_config", "torch_dtype", "dtype", "transformers_weights")
    plain: dict[str, Any] = {k: v for k, v in config.items() if k not in quantised}
    if isinstance(config.get("text_config"), Mapping):
        plain["text_config"] = {k: v for k, v in config["text_config"].items() if k not in quantised}
    return {**plain, "dtype": str(dtype).removeprefix("torch.")}


def plain_numel(files: CheckpointFiles, packing: Packing | None) -> dict[str, int]:
    """Stored tensor → number of elements that it has in the plain checkpoint; packed codes count unpacked."""
    if packing is None:
        return {name: info.numel for name, info in files.tensors.items()}
    codes = {weight.parts["codes"]: weight.num_bits for weight in packing.weights}
    found = {}
    for name, info in files.tensors.items():
        if name not in packing.consumed:
            found[name] = info.numel
        elif name in codes:
            a_byte = info.dtype not in ("uint8", "int32", "uint32")
            bits = 2.0 if info.dtype == "uint8" else codes[name]  # BitNet's bytes hold four codes
            found[name] = info.numel if a_byte else int(8 * info.nbytes / bits)
    return found


def _require_room(files: CheckpointFiles, packing: Packing, dtype: torch.dtype, directory: Path) -> None:
    """Raise ResourceError before unpacking if the disk has too little room."""
    nbytes = sum(plain_numel(files, packing).values()) * dtype.itemsize
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise ResourceError(
            f"{directory}: unpacking {files.directory} needs {nbytes / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free. "
            "Put the work directory on another disk with --output."
        )


def _write(files: CheckpointFiles, packing: Packing, dtype: torch.dtype, directory: Path) -> None:
    layers, _ = group_by_layer(files)
    layer_of = {info.name: layer for layer, members in layers.items() for info in members.values()}
    found: list[QuantizedModule] = []
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def put() -> None:
        if shard:
            name = f"model-{len(set(weight_map.values())):05d}.safetensors"
            save_file(shard, directory / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, name))
            shard.clear()

    for name, value in _tensors(files, packing, layer_of, found.append):
        if name in weight_map or name in shard:
            raise CheckpointError(f"{files.directory}: holds {name!r} twice, packed and plain; copy it again")
        shard[name] = value.to(dtype if value.is_floating_point() else value.dtype).contiguous().clone()
        if sum(t.nbytes for t in shard.values()) > _SHARD_NBYTES:
            put()
    put()
    index = {"metadata": {}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", plain_config(files.config, dtype))
    _write_json(directory / _FOUND, [asdict(module) for module in found])


def _tensors(
    files: CheckpointFiles,
    packing: Packing,
    layer_of: Mapping[str, int],
    report: Callable[[QuantizedModule], None],
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every plain tensor."""
    for weight in packing.weights:
        value, module = unpack_weight(files, weight, layer_of.get(weight.parts["codes"]))
        report(module)
        yield weight.name, value
    for name, info in files.tensors.items():
        if name in packing.consumed:
            continue
        value, factor = read_tensor(info), packing.scaled.get(name)
        yield name, value.float() * read_tensor(files.tensors[factor]).float() if factor else value


def unpack_weight(
    files: CheckpointFiles, weight: PackedWeight, layer: int | None
) -> tuple[Tensor, QuantizedModule]:
    """One weight (d_out, d_in), float32, and the record of how it is quantised. Raises CheckpointError if damaged.

    layer: the layer that holds it, from 1; None outside the blocks.
    """
    parts = {role: read_tensor(files.tensors[name]) for role, name in weight.parts.items()}
    found = weight.decode(parts)
    value = dequantize(weight.name, found)
    return value, describe(weight, found, value, layer)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
