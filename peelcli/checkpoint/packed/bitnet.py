"""Read BitNet's ternary weights as transformers stores them: four codes to a byte, or unpacked, with one scale.

`bitlinear` divides by the stored scale. `autobitlinear` multiplies by it, its bias included. Both round the inputs of
a linear map to 8 bits per token. In mode `online` the file holds latent weights, which are not packed. They are
quantised when they are read (`peelcli.stages.precision`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from peelcli.checkpoint.files import CheckpointFiles
from peelcli.checkpoint.packed.codes import Activations, Codes, PackedWeight, Packing, Parts, damaged
from peelcli.errors import CheckpointError

TERNARY_BITS = 1.584962500721156  # log2(3)
INT8 = Activations(8, 127.0, by_inverse=True)
_PER_BYTE = 4


def is_online(settings: Mapping[str, Any]) -> bool:
    """Whether the file holds latent weights, which are quantised whenever they are used."""
    return settings.get("quantization_mode") == "online" and settings.get("linear_class") == "autobitlinear"


def packing(settings: Mapping[str, Any], files: CheckpointFiles) -> Packing:
    """The packed weights: those that have a `weight_scale` beside them."""
    kind = settings.get("linear_class", "bitlinear")
    if kind not in ("bitlinear", "autobitlinear"):
        raise CheckpointError(
            f"config.json: quantization_config.linear_class is {kind!r}, expected 'bitlinear' or 'autobitlinear'"
        )
    found, scaled = [], {}
    for scale in sorted(name for name in files.tensors if name.endswith(".weight_scale")):
        module = scale.removesuffix(".weight_scale")
        name = f"{module}.weight"
        if name not in files.tensors:
            raise damaged(name, f"is missing, and {scale!r} is there")
        parts = {"codes": name, "scale": scale}
        decode = partial(_decode, name, divide=kind == "bitlinear")
        found.append(PackedWeight(name, "ternary", TERNARY_BITS, parts, decode))
        bias = f"{module}.bias"
        if kind == "autobitlinear" and bias in files.tensors:
            scaled[bias] = scale
    return Packing("bitnet", tuple(found), activations=INT8, scaled=scaled)


def _decode(name: str, parts: Parts, *, divide: bool) -> Codes:
    codes, scale = parts["codes"], parts["scale"].float()
    if codes.ndim != 2 or scale.numel() != 1:
        raise damaged(
            name, f"has codes of shape {list(codes.shape)} and {scale.numel()} steps, expected a matrix and 1"
        )
    if codes.dtype == torch.uint8:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(-1, 1, 1)
        codes = ((codes >> shifts) & 3).reshape(_PER_BYTE * codes.shape[0], -1).to(torch.int8) - 1
    values = codes.float()
    if not bool(((values == 0) | (values.abs() == 1)).all()):
        raise damaged(name, "holds codes other than −1, 0 and 1")
    step = (1.0 / scale if divide else scale).reshape(1, 1)
    return Codes(codes, step, (codes.shape[0], codes.shape[1]))
