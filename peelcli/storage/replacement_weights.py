"""Weights of references in HDF5, packed at their true size, and files that take their name only when they are whole."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from peelcli.quant.groups import scale_shape
from peelcli.quant.packing import pack, packed_nbytes, unpack
from peelcli.quant.schemes import SCHEMES, scheme_named
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.interface import QuantizedMatrix, Replacement, Scaling
from peelcli.storage.disk_full import DiskFullWriter
from peelcli.storage.hdf5 import create_h5, put_array, put_attribute
from peelcli.storage.hdf5_reader import Group


@contextmanager
def replacing(path: Path, *, sealed: bool = False) -> Iterator[h5py.File]:
    """A new HDF5 file that takes the name `path` only when the block ends well.

    sealed: with a checksum of the whole at its end, which `sink.is_sealed` looks at. ArtefactError where another
    process writes the file: what that one has written so far stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(DiskFullWriter(path.with_name(path.name + ".partial"), new=True)) as sink:
        try:
            with create_h5(sink) as file:
                yield file
            if sealed:
                sink.seal()
            sink.take_name(path)
        except BaseException:
            sink.delete()
            raise


def key_digest(key: str) -> str:
    """What a part keeps of the key of its fit, which may be longer than an attribute."""
    return hashlib.sha256(key.encode()).hexdigest()


def write_weights(group: h5py.Group, replacement: Replacement) -> None:
    """Store the weights of a reference, packed, under `group`/weights."""
    weights = group.create_group("weights")
    for name, matrix in replacement.quantized.items():
        one = weights.create_group(str(len(weights)))
        put_attribute(one, "name", name)
        put_attribute(one, "scheme", matrix.spec.scheme)
        one.attrs.update(
            shape=np.array(matrix.codes.shape),
            group_size=matrix.spec.group_size or 0,
            transposed=matrix.transposed,
        )
        put_array(one, "packed", pack(matrix.codes, scheme_named(matrix.spec.scheme)).cpu().numpy())
        put_array(one, "scale", matrix.scale.float().cpu().numpy())
        if matrix.zero_point is not None:
            put_array(one, "zero_point", matrix.zero_point.to(torch.int8).cpu().numpy())
    for name, scaling in replacement.scaled.items():
        one = weights.create_group(str(len(weights)))
        put_attribute(one, "name", name)
        one.attrs["dim"] = scaling.dim
        put_array(one, "factors", scaling.factors.detach().float().cpu().numpy())
    for name, value in replacement.plain.items():
        one = weights.create_group(str(len(weights)))
        put_attribute(one, "name", name)
        value = value.detach().cpu().contiguous()
        is_bfloat16 = value.dtype == torch.bfloat16
        put_array(one, "plain", (value.view(torch.uint16) if is_bfloat16 else value).numpy())
        put_attribute(one, "torch_dtype", str(value.dtype).removeprefix("torch."))


_ARRAYS = {
    "packed": ("uint8",),
    "scale": ("float32",),
    "zero_point": ("int8",),
    "factors": ("float32",),
    "plain": ("float32", "float16", "float64", "uint16"),  # bfloat16 as uint16
}
_ATTRIBUTES = {
    "name": str,
    "scheme": str,
    "torch_dtype": str,
    "group_size": int,
    "dim": int,
    "transposed": bool,
    "shape": tuple,
}


def copy_witness(source: Group, target: h5py.Group) -> None:
    """Store the weights of a reference once more, as they are, from `source`/weights."""
    weights = target.create_group("weights")
    for number, one in source.group("weights").groups():
        copy = weights.create_group(number)
        for name in (name for name in _ATTRIBUTES if one.has_attribute(name)):
            value = one.attribute(name, _ATTRIBUTES[name])
            if isinstance(value, str):
                put_attribute(copy, name, value)
            else:
                copy.attrs[name] = np.array(value) if isinstance(value, tuple) else value
        for name in (name for name in _ARRAYS if name in one):
            put_array(copy, name, one.array(name, _ARRAYS[name]))


def read_weights(group: Group, device: torch.device | str = "cpu") -> Replacement:
    """The weights of a reference, as `write_weights` stored them, on `device`."""
    quantized: dict[str, QuantizedMatrix] = {}
    plain: dict[str, Tensor] = {}
    scaled: dict[str, Scaling] = {}
    for _, one in group.group("weights").groups():
        name = one.attribute("name", str)
        with one.stored.reading(one.name):
            if name in quantized or name in plain or name in scaled:
                raise ValueError(f"there are two of {name!r}")
            if "plain" in one:
                plain[name] = _read_plain(one, device)
            elif "factors" in one:
                scaled[name] = _read_factors(one)
            else:
                quantized[name] = _read_quantized(one, device)
    return Replacement(quantized, plain, scaled)


def _values(group: Group, name: str, device: torch.device | str) -> Tensor:
    return torch.from_numpy(group.array(name, _ARRAYS[name])).to(device)


def _read_plain(group: Group, device: torch.device | str) -> Tensor:
    value, dtype = _values(group, "plain", device), group.attribute("torch_dtype", str)
    if dtype == "bfloat16":
        value = value.view(torch.bfloat16)
    if str(value.dtype) != f"torch.{dtype}":
        raise ValueError(f"expected {dtype}, found {value.dtype}")
    return value


def _read_factors(group: Group) -> Scaling:
    factors = torch.from_numpy(group.array("factors", ("float32",)))
    return Scaling(factors.reshape(-1), group.attribute("dim", int))


def _read_quantized(group: Group, device: torch.device | str) -> QuantizedMatrix:
    name, shape = group.attribute("scheme", str), group.attribute("shape", tuple)
    if name not in SCHEMES or SCHEMES[name].is_free:
        raise ValueError(f"expected a scheme with codes, found {name!r}")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"expected the shape of a matrix or of a stack of them, found {shape}")
    scheme, packed = SCHEMES[name], _values(group, "packed", device)
    if packed.shape != (packed_nbytes(math.prod(shape), scheme),):
        raise ValueError(f"{tuple(packed.shape)} bytes are not those of {name} codes of shape {shape}")
    codes = unpack(packed, scheme, shape)
    scale, zero_point = _values(group, "scale", device), None
    size = group.attribute("group_size", int) or None
    spec, whole = QuantSpec(name, size), (*shape[:-2], 1, 1)
    if size is None and tuple(scale.shape) == whole and shape[-2] > 1:
        spec = replace(spec, granularity="tensor")
    if tuple(scale.shape) not in (scale_shape(codes.shape, spec), () if size else whole):
        raise ValueError(f"scales of shape {tuple(scale.shape)} are not those of a matrix of shape {shape}")
    if "zero_point" in group:
        zero_point = _values(group, "zero_point", device).float()
        if zero_point.shape != scale.shape:
            raise ValueError(
                f"expected zero points of shape {tuple(scale.shape)}, found {tuple(zero_point.shape)}"
            )
    return QuantizedMatrix(codes, scale, spec, group.attribute("transposed", bool), zero_point)
