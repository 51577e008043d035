"""Read weights in 8-bit floats with one scale per block, as in DeepSeek's and transformers' `fp8` checkpoints.

weight (d_out, d_in) float8, weight_scale_inv (ceil(d_out / rows), ceil(d_in / columns)), which multiplies
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from peelcli.checkpoint.files import CheckpointFiles
from peelcli.checkpoint.packed.codes import Codes, PackedWeight, Packing, Parts, damaged, share

_FLOATS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
_NOTE = "activations run unrounded: the file asks for 8-bit floats, and peel rounds to int8 per token only"


def packing(settings: Mapping[str, Any], files: CheckpointFiles) -> Packing:
    """The packed weights: those that have a `weight_scale_inv` beside them."""
    block = settings.get("weight_block_size")
    declared = (block[0], block[1]) if isinstance(block, list) and len(block) == 2 else (None, None)
    found = []
    for scale in sorted(name for name in files.tensors if name.endswith(".weight_scale_inv")):
        name = scale.removesuffix("_scale_inv")
        dtype = files.tensors[name].dtype if name in files.tensors else "absent"
        if dtype not in _FLOATS:
            raise damaged(name, f"is {dtype}, expected float8 beside {scale!r}")
        parts = {"codes": name, "scale": scale}
        found.append(PackedWeight(name, _FLOATS[dtype], 8.0, parts, partial(_decode, name, declared)))
    unused = frozenset(n for n in files.tensors if n.endswith((".input_scale", ".activation_scale")))
    return Packing("fp8", tuple(found), unused, notes=(_NOTE,))


def _decode(name: str, declared: tuple[object, object], parts: Parts) -> Codes:
    codes, scale = parts["codes"].float(), parts["scale"].float()
    if scale.numel() == 1:
        return Codes(codes, scale.reshape(1, 1), (codes.shape[0], codes.shape[1]))
    if codes.ndim != 2 or scale.ndim != 2:
        raise damaged(
            name, f"has codes {list(codes.shape)} and steps {list(scale.shape)}, expected two matrices"
        )
    rows, columns = (share(name, codes.shape[i], scale.shape[i], declared[i]) for i in (0, 1))
    return Codes(codes, scale, (rows, columns))
