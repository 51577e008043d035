"""Read GPTQ's layout: codes packed along the inputs, a scale and a zero point per group of inputs, in any order.

    qweight (d_in · bits / 32, d_out), qzeros (n_groups, d_out · bits / 32), scales (n_groups, d_out), g_idx (d_in,)

The first version of the format stores each zero point minus one; `checkpoint_format: gptq_v2` stores the zero point.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from peelcli.checkpoint.files import CheckpointFiles
from peelcli.checkpoint.packed.bits import unpack_rows, words_needed
from peelcli.checkpoint.packed.codes import Codes, PackedWeight, Packing, Parts, damaged, qweights, share
from peelcli.errors import CheckpointError

_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero point


def packing(settings: Mapping[str, Any], files: CheckpointFiles) -> Packing:
    """The packed weights: those that have a `qweight`."""
    bits = settings.get("bits")
    layout = settings.get("checkpoint_format") or "gptq"
    if bits not in (2, 3, 4, 8):
        raise CheckpointError(
            f"config.json: quantization_config.bits is {bits!r}, expected 2, 3, 4 or 8 for GPTQ"
        )
    if not isinstance(layout, str) or layout not in _FORMATS:
        raise CheckpointError(
            f"config.json: quantization_config.checkpoint_format is {layout!r}, expected 'gptq' or 'gptq_v2'. Save "
            "the checkpoint in one of those, or dequantised"
        )
    found = []
    for module, parts in qweights(files):
        if f"{module}.g_idx" in files.tensors:
            parts["groups"] = f"{module}.g_idx"
        decode = partial(_decode, f"{module}.weight", bits, settings.get("group_size"), _FORMATS[layout])
        found.append(PackedWeight(f"{module}.weight", f"int{bits}", float(bits), parts, decode))
    return Packing("gptq", tuple(found))


def _decode(name: str, bits: int, declared: object, offset: int, parts: Parts) -> Codes:
    qweight, scales = parts["codes"], parts["scale"]
    if qweight.ndim != 2 or scales.ndim != 2 or scales.shape[1] != qweight.shape[1]:
        raise damaged(
            name, f"has codes {list(qweight.shape)} and steps {list(scales.shape)}, which do not match"
        )
    d_in, d_out, num_groups = qweight.shape[0] * 32 // bits, qweight.shape[1], scales.shape[0]
    groups = parts.get("groups")
    if groups is not None and words_needed(len(groups), bits) == qweight.shape[0]:
        d_in = len(groups)  # the last word of a column may hold fewer codes than it has room for
    codes = unpack_rows(qweight.T.contiguous(), bits, d_in)  # (d_out, d_in)
    zeros = unpack_rows(parts["zeros"], bits, d_out).int() + offset  # (n_groups, d_out)
    columns = share(name, d_in, num_groups, declared)
    in_order = groups is None or bool((groups.long() == _in_order(d_in, columns, groups)).all())
    return Codes(codes, scales.T, (1, columns), zeros.T, None if in_order else groups)


def _in_order(d_in: int, columns: int, like: Any) -> Any:
    return like.new_tensor(range(d_in)).long() // columns if like.shape == (d_in,) else -1
