"""Read AWQ's layout `gemm`: 4-bit codes packed along the outputs, eight to a word, interleaved.

qweight (d_in, d_out / 8), qzeros (n_groups, d_out / 8), scales (n_groups, d_out)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from peelcli.checkpoint.files import CheckpointFiles
from peelcli.checkpoint.packed.bits import unpack_rows
from peelcli.checkpoint.packed.codes import Codes, PackedWeight, Packing, Parts, damaged, qweights, share
from peelcli.errors import CheckpointError

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # position in a word of the codes of eight neighbouring outputs


def packing(settings: Mapping[str, Any], files: CheckpointFiles) -> Packing:
    """The packed weights: those that have a `qweight`."""
    bits = settings.get("bits", settings.get("w_bit", _BITS))
    version = str(settings.get("version", "gemm")).lower()
    if bits != _BITS or version != "gemm":
        raise CheckpointError(
            f"config.json: AWQ weights of {bits!r} bits in the layout {version!r}, expected 4 bits in 'gemm'. Save the "
            "checkpoint in that layout, or dequantised"
        )
    found = []
    for module, parts in qweights(files):
        declared = settings.get("group_size", settings.get("q_group_size"))
        decode = partial(_decode, f"{module}.weight", declared)
        found.append(PackedWeight(f"{module}.weight", "int4", float(_BITS), parts, decode))
    return Packing("awq", tuple(found))


def _decode(name: str, declared: object, parts: Parts) -> Codes:
    scales, qweight = parts["scale"], parts["codes"]
    if qweight.ndim != 2 or scales.ndim != 2 or scales.shape[1] != 8 * qweight.shape[1]:
        raise damaged(
            name, f"has codes {list(qweight.shape)} and steps {list(scales.shape)}, which do not match"
        )
    codes = _outputs(qweight)  # (d_in, d_out)
    columns = share(name, codes.shape[0], scales.shape[0], declared)
    return Codes(codes.T, scales.T, (1, columns), _outputs(parts["zeros"]).T)


def _outputs(words: Tensor) -> Tensor:
    """Words (n, d_out / 8) → codes (n, d_out) in the order of the outputs."""
    codes = unpack_rows(words, _BITS, 8 * words.shape[-1])
    return codes.reshape(len(codes), -1, 8)[:, :, list(_PLACES)].reshape(len(codes), -1)
