"""Weights of references in HDF5, packed at their true size, and files that take their name only when they are whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from peelcli.errors import ArtefactError
from peelcli.quant.packing import pack, unpack
from peelcli.quant.schemes import scheme_named
from peelcli.references.interface import QuantizedMatrix, Scaling, Witness
from peelcli.sink import Sink


@contextmanager
def replacing(path: Path, *, sealed: bool = False) -> Iterator[h5py.File]:
    """A new HDF5 file that takes the name `path` only when the block ends well.

    sealed: with a checksum of the whole at its end, which `sink.is_sealed` looks at. ArtefactError where another
    process writes the file: what that one has written so far stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(Sink(path.with_name(path.name + ".partial"), new=True)) as sink:
        try:
            with h5py.File(sink, "w") as file:
                yield file
            if sealed:
                sink.seal()
            sink.take_name(path)
        except BaseException:
            sink.delete()
            raise


def _put_plain(group: h5py.Group, value: Tensor) -> None:
    value = value.detach().cpu().contiguous()
    is_bfloat16 = value.dtype == torch.bfloat16
    group.create_dataset("plain", data=(value.view(torch.uint16) if is_bfloat16 else value).numpy())
    group.attrs["torch_dtype"] = str(value.dtype).removeprefix("torch.")


def write_witness(group: h5py.Group, witness: Witness) -> None:
    """Store the weights of a reference, packed, under `group`/weights."""
    weights = group.create_group("weights")
    for name, matrix in witness.quantized.items():
        one = weights.create_group(str(len(weights)))
        one.attrs.update(
            name=name,
            shape=np.array(matrix.codes.shape),
            scheme=matrix.scheme,
            group_size=matrix.group_size or 0,
            transposed=matrix.transposed,
        )
        one.create_dataset("packed", data=pack(matrix.codes, scheme_named(matrix.scheme)).cpu().numpy())
        one.create_dataset("scale", data=matrix.scale.float().cpu().numpy())
        if matrix.zero_point is not None:
            one.create_dataset("zero_point", data=matrix.zero_point.to(torch.int8).cpu().numpy())
    for name, scaling in witness.scaled.items():
        one = weights.create_group(str(len(weights)))
        one.attrs.update(name=name, dim=scaling.dim)
        one.create_dataset("factors", data=scaling.factors.detach().float().cpu().numpy())
    for name, value in witness.plain.items():
        one = weights.create_group(str(len(weights)))
        one.attrs["name"] = name
        _put_plain(one, value)


def read_witness(group: h5py.Group, device: torch.device | str = "cpu") -> Witness:
    """The weights of a reference, as `write_witness` stored them, on `device`."""
    quantized: dict[str, QuantizedMatrix] = {}
    plain: dict[str, Tensor] = {}
    scaled: dict[str, Scaling] = {}
    try:
        for one in group["weights"].values():
            name = str(one.attrs["name"])
            if "plain" in one:
                value = torch.from_numpy(one["plain"][...]).to(device)
                plain[name] = value.view(torch.bfloat16) if one.attrs["torch_dtype"] == "bfloat16" else value
                continue
            if "factors" in one:
                factors = torch.from_numpy(one["factors"][...]).reshape(-1)
                scaled[name] = Scaling(factors, int(one.attrs["dim"]))
                continue
            scheme = scheme_named(str(one.attrs["scheme"]))
            shape = tuple(int(n) for n in one.attrs["shape"])
            codes = unpack(torch.from_numpy(one["packed"][...]).to(device), scheme, shape)
            scale = torch.from_numpy(one["scale"][...]).to(device)
            zero_point = None
            if "zero_point" in one:
                zero_point = torch.from_numpy(one["zero_point"][...]).float().to(device)
            size, transposed = int(one.attrs["group_size"]) or None, bool(one.attrs["transposed"])
            quantized[name] = QuantizedMatrix(codes, scale, scheme.name, size, transposed, zero_point)
    except (KeyError, ValueError, TypeError, OSError, RuntimeError) as error:
        raise ArtefactError(
            f"{group.file.filename}: the weights of {group.name} are damaged ({error}); fit again."
        ) from error
    return Witness(quantized, plain, scaled)
