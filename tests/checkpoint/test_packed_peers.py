"""Packed by the tools themselves: what transformers' BitNet classes and compressed-tensors make of it, so must peel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits, opened
from packing import (
    IDS,
    Made,
    Pack,
    Parts,
    make,
    reference_logits,
    require_same,
    to_words,
)
from torch import Tensor
from transformers.integrations.bitnet import pack_weights

from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.packed.compressed_tensors import packing
from peelcli.errors import CheckpointError
from peelcli.stages.precision import precision_of

# -- BitNet ----------------------------------------------------------------------------------------------------------


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().mean()
    return (weight / scale).round().clamp(-1, 1), scale


def bitlinear(weight: Tensor, _: torch.Generator) -> tuple[Parts, Tensor]:
    codes, scale = ternary(weight)
    return {"weight": pack_weights(codes.clone()), "weight_scale": (1 / scale).reshape(1)}, codes * scale


def autobitlinear(weight: Tensor, _: torch.Generator) -> tuple[Parts, Tensor]:
    codes, scale = ternary(weight)
    return {"weight": pack_weights(codes.clone()), "weight_scale": scale.reshape(1)}, codes * scale


def unpacked(weight: Tensor, _: torch.Generator) -> tuple[Parts, Tensor]:
    codes, scale = ternary(weight)
    return {"weight": codes, "weight_scale": scale.reshape(1)}, codes * scale


@pytest.mark.parametrize(
    ("pack", "kind"),
    [(bitlinear, "bitlinear"), (autobitlinear, "autobitlinear"), (unpacked, "autobitlinear")],
)
@pytest.mark.parametrize("bias", [False, True])
def test_bitnet_packed_runs_as_in_transformers(tmp_path: Path, pack: Pack, kind: str, bias: bool) -> None:
    settings = {"quant_method": "bitnet", "linear_class": kind, "modules_to_not_convert": ["lm_head"]}
    made = make(tmp_path, pack, settings, attention_bias=bias)
    if bias:
        give_biases(made.directory)
    model = opened(made.directory, tmp_path / "off")
    difference = (logits(model, IDS) - reference_logits(made.directory)).abs().amax(-1)  # (n_seq, seq_len)
    # transformers multiplies the codes and divides the product; a last bit may send an input that is half-way between
    # two levels the other way. The first token of a sequence is such a case: it attends to small whole numbers alone.
    assert difference.max() < 0.05
    assert (difference < 1e-4).float().mean() > 0.9
    assert {(m.scheme, m.granularity) for m in model.all_quantized()} == {("ternary", "tensor")}


def give_biases(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith(".bias"):
            tensors[name] = torch.linspace(-1, 1, len(value))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


ONLINE: dict[str, Any] = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "online",
}


@pytest.mark.parametrize(
    "left_out", [["lm_head"], None, [], ["lm_head", "model.layers.1"], ["layers.*.mlp", "q_proj"]]
)
def test_bitnet_online_rounds_the_latents_that_transformers_rounds(
    tmp_path: Path, left_out: list[str] | None
) -> None:
    settings = {**ONLINE, "modules_to_not_convert": left_out}
    made = make(tmp_path, lambda w, _: ({"weight": w}, w), settings)
    model = opened(made.directory, tmp_path / "off")
    torch.testing.assert_close(logits(model, IDS), reference_logits(made.directory), atol=1e-4, rtol=1e-4)


def test_latents_are_not_the_weights(tmp_path: Path) -> None:
    made = make(tmp_path, lambda w, _: ({"weight": w}, w), ONLINE)
    model = opened(made.directory, tmp_path / "off")
    with torch.no_grad():
        assert (logits(model, IDS) - made.plain(IDS).logits).abs().max() > 0.1
    assert model.quantized(1)["mlp.up_proj.weight"].clipped is not None


@pytest.mark.parametrize("pattern", ["(a+)+$", "*" * 9, 3, "a" * 300, ""])
def test_a_pattern_that_could_take_for_ever_is_refused(tmp_path: Path, pattern: object) -> None:
    made = make(tmp_path, lambda w, _: ({"weight": w}, w), {**ONLINE, "modules_to_not_convert": [pattern]})
    with pytest.raises(CheckpointError, match="modules_to_not_convert"):
        precision_of(open_checkpoint(made.directory))


def test_bitnet_with_norms_of_its_own_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path, bitlinear, {"quant_method": "bitnet", "use_rms_norm": True})
    with pytest.raises(CheckpointError, match="use_rms_norm"):
        precision_of(open_checkpoint(made.directory))


def test_codes_that_are_not_ternary_are_refused(tmp_path: Path) -> None:
    def pack(weight: Tensor, _: torch.Generator) -> tuple[Parts, Tensor]:
        return {"weight": torch.full((weight.shape[0] // 4, weight.shape[1]), 255, dtype=torch.uint8),
                "weight_scale": torch.ones(1)}, weight  # fmt: skip

    made = make(tmp_path, pack, {"quant_method": "bitnet"})
    with pytest.raises(CheckpointError, match="other than −1, 0 and 1"):
        opened(made.directory, tmp_path / "off")


# -- compressed-tensors ----------------------------------------------------------------------------------------------


def by_the_package(layout: str, settings: dict[str, Any]) -> tuple[Pack, dict[str, Any]]:
    """Packed, and dequantised again for comparison, by compressed-tensors itself."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    tool = BaseCompressor.get_value_from_registry(layout)

    def pack(weight: Tensor, _: torch.Generator) -> tuple[Parts, Tensor]:
        size = settings.get("group_size") or weight.shape[1]
        rows = (
            weight.reshape(1, 1, -1) if settings["strategy"] == "tensor" else weight.unflatten(1, (-1, size))
        )
        scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), scheme.weights)
        if settings["strategy"] == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        stored = tool.compress(parts, scheme)
        return stored, tool.decompress(dict(stored), scheme)["weight"].float()

    group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json")}
    return pack, {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "size"), [("group", 16), ("channel", None)])
def test_pack_quantized(
    tmp_path: Path, num_bits: int, symmetric: bool, strategy: str, size: int | None
) -> None:
    asked = {"num_bits": num_bits, "symmetric": symmetric, "strategy": strategy, "group_size": size}
    made = make(tmp_path / "m", *by_the_package("pack-quantized", asked))
    found = require_same(made, tmp_path / "off").quantized(2)["mlp.down_proj.weight"]
    assert (found.scheme, found.granularity, found.group_size) == (f"int{num_bits}", strategy, size)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize(
    ("layout", "kind"), [("int-quantized", "int"), ("naive-quantized", "int"), ("float-quantized", "float")]
)
def test_a_code_a_byte(tmp_path: Path, layout: str, kind: str, strategy: str) -> None:
    asked = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy}
    found = require_same(make(tmp_path / "m", *by_the_package(layout, asked)), tmp_path / "off")
    schemes = {(m.scheme, m.granularity) for m in found.all_quantized()}
    assert schemes == {("int8" if kind == "int" else "fp8_e4m3", strategy)}


def test_words_with_gaps_as_older_versions_wrote_them(tmp_path: Path) -> None:
    def pack(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
        codes = torch.randint(0, 8, weight.shape, generator=generator)  # 3 bits, 10 codes a word
        words = torch.cat([to_words(part, 3) for part in codes.split(10, dim=1)], dim=1)
        scale = 0.02 + 0.05 * torch.rand(weight.shape[0], 1, generator=generator)
        parts = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
        return parts, (codes - 4) * scale

    weights = {"num_bits": 3, "strategy": "channel"}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    made = make(tmp_path / "m", pack, {**settings, "config_groups": {"g": {"weights": weights}}})
    require_same(made, tmp_path / "off")


def int8_inputs(made: Made, peak: float) -> None:
    """The plain model of `made`, with the inputs of its blocks' linear maps rounded as they are asked to be."""

    def rounded(_: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        step = args[0].abs().amax(-1, keepdim=True).clamp_min(1e-5) / peak
        return ((args[0] / step).round().clamp(-128, 127) * step,)

    for name, module in made.plain.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(rounded)


def test_inputs_rounded_to_int8_a_token(tmp_path: Path) -> None:
    pack, settings = by_the_package(
        "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}
    )
    asked = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    settings["config_groups"]["group_0"]["input_activations"] = asked
    made = make(tmp_path / "m", pack, settings)
    with torch.no_grad():
        unrounded = made.plain(IDS).logits
    int8_inputs(made, 127.5)
    model = require_same(made, tmp_path / "off")
    assert (logits(model, IDS) - unrounded).abs().max() > 1e-3


def test_inputs_that_peel_does_not_round_are_a_note(tmp_path: Path) -> None:
    pack, settings = by_the_package(
        "naive-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}
    )
    asked = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    settings["config_groups"]["group_0"]["input_activations"] = asked
    made = make(tmp_path / "m", pack, settings)
    (note,) = packing(settings, open_checkpoint(made.directory)).notes
    assert "float 8 per tensor" in note


@pytest.mark.parametrize("layout", ["marlin-24", "nvfp4-pack-quantized", "sparse-bitmask", None, 3])
def test_other_formats_of_compressed_tensors_are_named(tmp_path: Path, layout: object) -> None:
    made = make(tmp_path, bitlinear, {"quant_method": "compressed-tensors", "format": layout})
    with pytest.raises(CheckpointError, match="expected one of pack-quantized"):
        precision_of(open_checkpoint(made.directory))
