"""Read torchao's tensors as transformers writes them into safetensors: one stored tensor for each part of a weight.

    …._weight_qdata (d_out, d_in) int8 or float8, …._weight_scale, …._weight_zero_point

The file's header names the torchao class of each weight. Classes that store one code per byte are read. The others
have a layout for one particular kernel and are refused. torchao itself is not needed, and none of its classes is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from peelcli.checkpoint.files import CheckpointFiles
from peelcli.checkpoint.packed.codes import (
    Activations,
    Codes,
    PackedWeight,
    Packing,
    Parts,
    damaged,
    share,
)
from peelcli.checkpoint.safetensors_format import read_metadata
from peelcli.errors import CheckpointError

_READ = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
_FLOATS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
_PARTS = {"qdata": "codes", "scale": "scale", "zero_point": "zeros"}


def packing(settings: Mapping[str, Any], files: CheckpointFiles) -> Packing:
    """The packed weights: those whose entry in the header is one of torchao's classes."""
    if files.format != "safetensors":
        raise CheckpointError(
            f"{files.directory}: torchao tensors in a pickle hold classes, which peel does not execute. Save the model "
            "with safe_serialization, or dequantised"
        )
    found, asked = [], set()
    for name, entry in _entries(files).items():
        kind, attributes = entry.get("_type"), entry.get("_data")
        if kind == "Tensor":
            continue
        if not isinstance(kind, str) or kind not in _READ or not isinstance(attributes, Mapping):
            raise CheckpointError(
                f"{files.directory}: {name!r} is a torchao {kind}, which is laid out for one kernel; expected one of "
                f"{', '.join(_READ)}. Dequantise it with torchao, then save_pretrained"
            )
        module, _, key = name.rpartition(".")
        parts = {role: f"{module}._{key}_{part}" for part, role in _PARTS.items()}
        parts = {role: part for role, part in parts.items() if part in files.tensors}
        if not {"codes", "scale"} <= parts.keys():
            raise damaged(name, "lacks its qdata or its scale")
        if f"{module}._{key}_act_pre_scale" in files.tensors:
            raise damaged(name, "scales its inputs beforehand (act_pre_scale)")
        asked.add(_activation(attributes))
        scheme, bits = _scheme(name, attributes, files.tensors[parts["codes"]].dtype)
        found.append(
            PackedWeight(name, scheme, bits, parts, partial(_decode, name, attributes.get("block_size")))
        )
    per_token = asked == {"int8"}
    notes = (
        ()
        if per_token or asked <= {"none"}
        else (
            f"activations run unrounded: the file asks for {', '.join(sorted(asked))}, and peel rounds to int8 per "
            "token only",
        )
    )
    return Packing(
        "torchao", tuple(found), activations=Activations(8, 127.5) if per_token else None, notes=notes
    )


def _entries(files: CheckpointFiles) -> dict[str, Mapping[str, Any]]:
    """Weight name → its entry in the header of its file."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in files.files:
        for name, text in read_metadata(file).items():
            if "." not in name or not isinstance(text, str):
                continue
            try:
                entry = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise CheckpointError(
                    f"{file}: its header says of {name!r} what is no JSON ({error})"
                ) from error
            if isinstance(entry, dict):
                found[name] = entry
    return found


def _activation(attributes: Mapping[str, Any]) -> str:
    asked = attributes.get("act_quant_kwargs") or attributes.get("activation_quantization")
    if not asked:
        return "none"
    inner = asked.get("_data") if isinstance(asked, Mapping) else None
    symmetric = isinstance(inner, Mapping) and (inner.get("mapping_type") or {}).get("_data") == "SYMMETRIC"
    by_row = isinstance(inner, Mapping) and (inner.get("granularity") or {}).get("_type") == "PerRow"
    kind = asked.get("_type") if isinstance(asked, Mapping) else asked
    return "int8" if kind == "QuantizeTensorToInt8Kwargs" and symmetric and by_row else str(kind)


def _scheme(name: str, attributes: Mapping[str, Any], dtype: str) -> tuple[str, float]:
    if dtype in _FLOATS:
        return _FLOATS[dtype], 8.0
    if dtype != "int8":
        raise damaged(name, f"is stored as {dtype}, expected int8 or float8")
    target = attributes.get("target_dtype")
    said = target.get("_data") if isinstance(target, Mapping) else "int8"
    widths = {f"int{n}": n for n in range(1, 9)}
    if said not in widths:
        raise damaged(name, f"is of {said!r}, expected int1 to int8")
    return str(said), float(widths[str(said)])


def _decode(name: str, block: object, parts: Parts) -> Codes:
    codes, scale, zeros = parts["codes"], parts["scale"], parts.get("zeros")
    if codes.ndim != 2:
        raise damaged(name, f"has codes of shape {list(codes.shape)}, expected (d_out, d_in)")
    codes = codes.float() if codes.dtype.is_floating_point else codes
    declared = (block[0], block[1]) if isinstance(block, list) and len(block) == 2 else (None, None)
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif scale.ndim == 1 and len(scale) == codes.shape[0]:
        scale = scale.unsqueeze(1)
    if scale.ndim != 2:
        raise damaged(name, f"of shape {list(codes.shape)} has steps of shape {list(scale.shape)}")
    rows, columns = (share(name, codes.shape[i], scale.shape[i], declared[i]) for i in (0, 1))
    if zeros is not None and zeros.numel() == scale.numel():
        zeros = zeros.reshape(scale.shape)
    return Codes(codes, scale, (rows, columns), zeros)
