"""Read one `.safetensors` file: the table of its tensors, and their contents in slices of rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from peelcli.checkpoint.reading import StoredTensor
from peelcli.errors import CheckpointError

# The format's dtype codes under torch's names, so that a tensor hashes alike whichever format holds it.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
_AGAIN = "copy or download the file again"
_MANY, _LEAST_NBYTES = 10_000, 16  # tensors in a file, and bytes of one on average
MAX_HEADER_NBYTES = 100_000_000  # the format's own limit


def list_tensors(file: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name → (dtype as torch names it, shape, bytes), in the order of the file. Reads the header only.

    Raises CheckpointError if the file is truncated or damaged, or holds a dtype that torch lacks.
    """
    header = _header(file)
    try:
        # The library checks what the header claims: offsets against shapes, gaps, overlaps.
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not a valid safetensors file ({error}); {_AGAIN}, or save it anew with save_pretrained"
        ) from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{file}: tensor {name!r} has dtype {entry['dtype']!r}, expected one of {', '.join(DTYPES)}; "
                "save the checkpoint in one of those, for example bfloat16"
            )
        start, end = entry["data_offsets"]
        tensors[name] = (DTYPES[entry["dtype"]], tuple(entry["shape"]), end - start)
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The header's `__metadata__`: text by name, free-form and untrusted; {} if there is none."""
    found = _header(file).get("__metadata__")
    return found if isinstance(found, dict) else {}


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """The JSON header of the file. Raises CheckpointError if the file is shorter than the header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise CheckpointError(
                f"{file}: truncated or not safetensors: its header should be {length:,} bytes long, "
                f"but the whole file has {size:,}; {_AGAIN}"
            )
        if length > MAX_HEADER_NBYTES:
            raise CheckpointError(
                f"{file}: its header should be {length:,} bytes long, expected at most {MAX_HEADER_NBYTES:,}; {_AGAIN}"
            )
        raw = stream.read(length)
    _require_filled(file, raw.count(b'"dtype"'), size - 8 - length)
    try:
        header: dict[str, dict[str, Any]] = json.loads(raw)
        if raw.count(b'"dtype"') != len(header.keys() - {"__metadata__"}):
            json.loads(raw, object_pairs_hook=_once)  # takes several times as long
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: its safetensors header is damaged ({error!r}); {_AGAIN}") from error
    if size < expected:
        raise CheckpointError(
            f"{file}: truncated: its header promises {expected:,} bytes, the file has {size:,}; {_AGAIN}"
        )
    return header


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The place of each tensor in the file, by name."""
    with file.open("rb") as stream:
        begin = 8 + int.from_bytes(stream.read(8), "little")
    header = _header(file)
    return {
        name: StoredTensor(file, name, dtype, shape, begin + header[name]["data_offsets"][0])
        for name, (dtype, shape, _) in list_tensors(file).items()
    }


def _require_filled(file: Path, count: int, nbytes: int) -> None:
    """Raise CheckpointError for a header with very many nearly empty tensors, before it is parsed."""
    if count > _MANY and nbytes < _LEAST_NBYTES * count:
        raise CheckpointError(
            f"{file}: its header lists about {count:,} tensors, and {nbytes:,} bytes follow it, so most tensors are "
            "empty, as DeepSpeed's ZeRO-3 leaves what save_pretrained writes without gathering. Merge the shards with "
            "DeepSpeed's zero_to_fp32.py, then save_pretrained"
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of the header. Raises ValueError if a name occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands in it twice")
    return found


@contextmanager
def opened(file: Path) -> Iterator[Callable[[str, slice | None], torch.Tensor]]:
    """Yields `read(name, rows)`: a tensor, or a slice of its first dimension, on the CPU."""
    try:
        tensors = stored_tensors(file)
    except (KeyError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be opened ({error}); {_AGAIN}") from error

    def read(name: str, rows: slice | None) -> torch.Tensor:
        if name not in tensors:
            raise CheckpointError(f"{file}: tensor {name!r} is no longer in the file; {_AGAIN}")
        return tensors[name].read(rows)

    yield read
