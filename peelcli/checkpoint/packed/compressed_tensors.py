"""The formats of compressed-tensors (llm-compressor) that hold integers or 8-bit floats, packed or one a byte.

    weight_packed (d_out, n_words) int32 with weight_shape (2,)   or   weight (d_out, d_in) int8 or float8
    weight_scale, weight_zero_point (packed along the outputs where the weight is packed), weight_g_idx

Bits, groups and zero points follow from the shapes, so that no pattern of the config is needed to tell which module
is quantised how. Codes are stored from 0 up; newer versions leave no gaps between words, older ones did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peelcli.checkpoint.files import CheckpointFiles, read_tensor
from peelcli.checkpoint.packed.bits import unpack_rows, words_needed
from peelcli.checkpoint.packed.codes import (
    Activations,
    Codes,
    PackedWeight,
    Packing,
    Parts,
    damaged,
    share,
)
from peelcli.errors import CheckpointError

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_FLOATS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale")


def packing(settings: Mapping[str, Any], files: CheckpointFiles) -> Packing:
    """The packed weights: those that have a `weight_scale` beside them."""
    layout = settings.get("format")
    groups = list(_groups(settings))
    # Whatever stands there: it need not be text, nor anything that a set takes.
    layouts = {str(f) for f in (layout, *(g.get("format") for g in groups)) if f not in (None, "dense")}
    strange = sorted(layouts - set(_FORMATS))
    if strange or not layouts:
        raise CheckpointError(
            f"config.json: compressed-tensors in the format {strange[0] if strange else layout!r}, expected one of "
            f"{', '.join(_FORMATS)}. Decompress it with compressed-tensors, then save_pretrained"
        )
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise CheckpointError(
            f"config.json: sparse weights in the format {sparsity.get('format')!r}, which peel does not unpack. "
            "Decompress it with compressed-tensors, then save_pretrained"
        )
    widths = sorted({int(g["weights"]["num_bits"]) for g in groups if _is_width(g)})
    declared = _declared([g["weights"] for g in groups if isinstance(g.get("weights"), Mapping)])
    found = [
        _weight(scale.removesuffix(".weight_scale"), widths, declared, files)
        for scale in sorted(name for name in files.tensors if name.endswith(".weight_scale"))
    ]
    activations, notes = _activations(groups)
    if settings.get("kv_cache_scheme"):
        notes += ("keys and values are not rounded: there is no cache in an audit",)
    unused = frozenset(n for n in files.tensors if n.rpartition(".")[2] in _UNUSED)
    return Packing("compressed-tensors", tuple(found), unused, activations, notes)


def _groups(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield group


def _is_width(group: Mapping[str, Any]) -> bool:
    weights = group.get("weights")
    return isinstance(weights, Mapping) and weights.get("num_bits") in range(1, 9)


def _declared(weights: list[Mapping[str, Any]]) -> tuple[object, object]:
    """Rows and columns that share a step, as far as all groups of the config say the same."""
    blocks = {str(w.get("block_structure")): w.get("block_structure") for w in weights}
    sizes = {str(w.get("group_size")): w.get("group_size") for w in weights}
    block = next(iter(blocks.values())) if len(blocks) == 1 else None
    if isinstance(block, list) and len(block) == 2:
        return block[0], block[1]
    return None, next(iter(sizes.values())) if len(sizes) == 1 else None


def _activations(groups: list[Mapping[str, Any]]) -> tuple[Activations | None, tuple[str, ...]]:
    """How inputs are rounded, where all groups agree on int8 per token; else a note that they are not."""
    asked = [g["input_activations"] for g in groups if isinstance(g.get("input_activations"), Mapping)]
    if not asked:
        return None, ()
    plain = all(
        a.get("type", "int") == "int"
        and a.get("num_bits") == 8
        and a.get("strategy") == "token"
        and a.get("symmetric", True)
        for a in asked
    )
    if plain and len(asked) == len(groups):
        return Activations(8, 127.5), ()
    what = ", ".join(sorted({f"{a.get('type')} {a.get('num_bits')} per {a.get('strategy')}" for a in asked}))
    return None, (
        f"activations run unrounded: the file asks for {what}, and peel rounds to int8 per token only",
    )


def _weight(
    module: str, widths: list[int], declared: tuple[object, object], files: CheckpointFiles
) -> PackedWeight:
    name, tensors = f"{module}.weight", files.tensors
    parts = {"scale": f"{module}.weight_scale"}
    for role, key in (("zeros", "weight_zero_point"), ("groups", "weight_g_idx"), ("shape", "weight_shape")):
        if f"{module}.{key}" in tensors:
            parts[role] = f"{module}.{key}"
    if f"{module}.weight_packed" in tensors:
        parts["codes"] = f"{module}.weight_packed"
        if "shape" not in parts:
            raise damaged(name, "has no weight_shape")
        bits = _bits(name, widths, files, parts)
        decode = partial(_decode_packed, name, bits, declared)
        return PackedWeight(name, f"int{bits}", float(bits), parts, decode)
    if name not in tensors:
        raise damaged(name, f"is missing, and {parts['scale']!r} is there")
    parts["codes"] = name
    dtype = tensors[name].dtype
    if dtype == "int8":
        bits = widths[-1] if widths else 8
        return PackedWeight(name, f"int{bits}", float(bits), parts, partial(_decode_bytes, name, declared))
    if dtype in _FLOATS:
        return PackedWeight(name, _FLOATS[dtype], 8.0, parts, partial(_decode_bytes, name, declared))
    raise damaged(
        name, f"is stored as {dtype}, expected int8 or float8: it was saved before it was compressed"
    )


def _bits(name: str, widths: list[int], files: CheckpointFiles, parts: Mapping[str, str]) -> int:
    """The width of the codes: the only one that the config has. Several are told apart by the length of a row."""
    if len(widths) == 1:
        return widths[0]
    shape = read_tensor(files.tensors[parts["shape"]]).flatten().tolist()
    words = files.tensors[parts["codes"]].shape[-1]
    fitting = [b for b in widths if len(shape) == 2 and words in _row_lengths(int(shape[1]), b)]
    if len(fitting) != 1:
        raise damaged(name, f"has rows of {words} words, which fit {len(fitting)} of the widths {widths}")
    return fitting[0]


def _row_lengths(count: int, bits: int) -> tuple[int, int]:
    """Words a row without gaps, and with: as many codes a word as fit whole."""
    return words_needed(count, bits), -(-count // (32 // bits))


def _decode_packed(name: str, bits: int, declared: tuple[object, object], parts: Parts) -> Codes:
    packed, scale, shape = parts["codes"], parts["scale"], [int(n) for n in parts["shape"].flatten().tolist()]
    if len(shape) != 2 or min(shape) < 1 or packed.ndim != 2 or packed.shape[0] != shape[0]:
        raise damaged(name, f"is said to be of shape {shape}, and its codes are {list(packed.shape)}")
    gaps = _has_gaps(packed, bits, shape[1])
    codes = _codes(name, packed, bits, shape[1], gaps)
    scale, block = _steps(name, scale, tuple(codes.shape), declared)
    zeros = parts.get("zeros")
    if zeros is not None and zeros.dtype in (torch.int32, torch.uint32):  # packed along the outputs
        zeros = _codes(name, zeros.T.contiguous(), bits, scale.shape[0], gaps).T
    return Codes(codes, scale, block, _as_steps(zeros, scale), parts.get("groups"))


def _has_gaps(packed: Tensor, bits: int, count: int) -> bool:
    """Whether each word of a row of `count` codes holds whole codes only, as older versions wrote them."""
    dense, gapped = _row_lengths(count, bits)
    if dense != gapped:
        return packed.shape[1] != dense
    unused = (
        32 % bits
    )  # as many words either way: then the bits at the top of each tell, which gaps leave at 0
    return unused > 0 and not bool((packed >> (32 - unused) & (2**unused - 1)).any())


def _codes(name: str, packed: Tensor, bits: int, count: int, gaps: bool) -> Tensor:
    """Signed codes int8 (n, count) from words (n, n_words)."""
    expected = _row_lengths(count, bits)[gaps]
    if packed.ndim != 2 or packed.shape[1] != expected:
        raise damaged(name, f"has words of shape {list(packed.shape)} for {count} codes of {bits} bits a row")
    if gaps:
        shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
        codes = ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)[:, :count]
    else:
        codes = unpack_rows(packed, bits, count)
    signed: Tensor = codes.to(torch.int16) - 2 ** (bits - 1)
    return signed.to(torch.int8)


def _decode_bytes(name: str, declared: tuple[object, object], parts: Parts) -> Codes:
    codes = parts["codes"]
    if codes.ndim != 2:
        raise damaged(name, f"has codes of shape {list(codes.shape)}, expected (d_out, d_in)")
    codes = codes.float() if codes.dtype.is_floating_point else codes
    scale, block = _steps(name, parts["scale"], tuple(codes.shape), declared)
    return Codes(codes, scale, block, _as_steps(parts.get("zeros"), scale), parts.get("groups"))


def _steps(
    name: str, scale: Tensor, shape: tuple[int, ...], declared: tuple[object, object]
) -> tuple[Tensor, tuple[int, int]]:
    """The steps as a matrix, and the block of weights that each serves: a tensor, a channel, a group or a square."""
    d_out, d_in = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1), (d_out, d_in)
    if scale.ndim == 1 and len(scale) == d_out:
        scale = scale.unsqueeze(1)
    if scale.ndim != 2:
        raise damaged(name, f"of shape {list(shape)} has steps of shape {list(scale.shape)}")
    rows = 1 if scale.shape[0] == d_out else share(name, d_out, scale.shape[0], declared[0])
    return scale, (rows, share(name, d_in, scale.shape[1], declared[1]))


def _as_steps(zeros: Tensor | None, scale: Tensor) -> Tensor | None:
    return zeros.reshape(scale.shape) if zeros is not None and zeros.numel() == scale.numel() else zeros
