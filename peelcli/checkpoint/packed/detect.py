"""Does a checkpoint say, in its config or by its tensors, that it is quantised? Then it is opened so or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peelcli.checkpoint.files import CheckpointFiles
from peelcli.checkpoint.packed import awq, bitnet, compressed_tensors, fp8, gptq, torchao
from peelcli.checkpoint.packed.codes import Packing
from peelcli.errors import CheckpointError

# One file per format; the keys are what quantization_config calls them.
FORMATS: dict[str, Callable[[Mapping[str, Any], CheckpointFiles], Packing]] = {
    "bitnet": bitnet.packing,
    "compressed-tensors": compressed_tensors.packing,
    "gptq": gptq.packing,
    "awq": awq.packing,
    "fp8": fp8.packing,
    "torchao": torchao.packing,
}
# How the others are turned into something that opens; what is not named here is dequantised by its own tool.
_HOW = {
    "bitsandbytes": "load it with transformers and call model.dequantize(), then save_pretrained",
    "hqq": "load it with transformers and call model.dequantize(), then save_pretrained",
    "auto-round": "export it with AutoRound in the format auto_gptq or llm_compressor",
    "mxfp4": "load it with Mxfp4Config(dequantize=True), then save_pretrained",
}
# Parts of packed weights, of these formats and of others'.
_SIGNS = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_zero_point",
    "_blocks",
    ".absmax",
    ".quant_map",
    ".SCB",
    ".W_q",
    "_weight_qdata",
)
_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")


def quantization_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a config.json, or of its part on the language model; None where there is none."""
    nested = config.get("text_config")
    for holder in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            found = holder.get(key)
            if found is None:
                continue
            if not isinstance(found, Mapping):
                raise CheckpointError(
                    f"config.json: {key} is a {type(found).__name__}, expected an object; correct it"
                )
            default = "compressed-tensors" if key == "compression_config" else None
            return {"quant_method": default, **found}
    return None


def find_packing(files: CheckpointFiles) -> Packing | None:
    """The packed weights of a checkpoint; None if its weights are plain.

    Raises CheckpointError if the checkpoint says that it is quantised but cannot be read as such. Quantised weights are
    never read as if they were plain.
    """
    settings = quantization_settings(files.config)
    if settings is None:
        sign = _sign(files, frozenset())
        if sign is not None:
            raise CheckpointError(
                f"{files.directory}: {sign!r} is part of a packed weight, and config.json has no quantization_config "
                "that says how it is packed. Copy the config.json of the quantised model, or dequantise it"
            )
        return None
    method = settings.get("quant_method")
    if method == "bitnet" and settings.get("use_rms_norm"):
        raise CheckpointError(
            f"{files.directory}: BitNet with use_rms_norm has a norm inside each linear map, which the plain model has "
            "no place for; peel cannot run it"
        )
    if method == "bitnet" and bitnet.is_online(settings):
        return (
            None  # latent weights: `peelcli.stages.precision` says how they are quantised when they are read
        )
    if not isinstance(method, str) or method not in FORMATS:
        how = _HOW.get(str(method), "dequantise it with the tool that wrote it, then save_pretrained")
        raise CheckpointError(
            f"{files.directory}: config.json says that its weights are quantised by {method!r}, which peel does not "
            f"unpack (it unpacks {', '.join(FORMATS)}). To audit it, {how}"
        )
    found = FORMATS[method](settings, files)
    left = _sign(files, found.consumed)
    if not found.weights or left is not None:
        what = (
            f"{left!r} is not part of a weight that it could unpack"
            if left
            else "no packed weight is in its files"
        )
        raise CheckpointError(
            f"{files.directory}: config.json says that its weights are quantised by {method!r}, and {what}. Check that "
            "config.json and the weights come from the same run, or dequantise the checkpoint"
        )
    return found


def _sign(files: CheckpointFiles, consumed: frozenset[str]) -> str | None:
    """The name of a tensor that looks like part of a packed weight and is not in `consumed`; None if there is none."""
    for name, info in files.tensors.items():
        if name in consumed:
            continue
        is_matrix = name.endswith(".weight") and len(info.shape) == 2 and info.dtype in _INTEGERS
        if is_matrix or name.endswith(_SIGNS):
            return name
    return None
