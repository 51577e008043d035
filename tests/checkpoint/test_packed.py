"""Packed checkpoints run as what they stand for; what cannot be opened so is refused, never read as plain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits, opened
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing import Pack, Parts, draw, make, require_same, steps, to_words, write
from safetensors.torch import load_file
from torch import Tensor

from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.packed.bits import unpack_rows
from peelcli.checkpoint.packed.detect import find_packing
from peelcli.checkpoint.plain import plain_numel
from peelcli.errors import CheckpointError
from peelcli.stages.precision import precision_of

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}


def gptq(bits: int = 4, size: int = 8, offset: int = 1, order: bool = False) -> Pack:
    def pack(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
        d_out, d_in = weight.shape
        groups = torch.arange(d_in) // size
        if order:
            groups = groups[torch.randperm(d_in, generator=generator)]
        codes = draw((d_out, d_in), 2**bits, generator)
        zeros = draw((d_in // size, d_out), 2**bits - 1, generator) + offset
        scale = steps((d_in // size, d_out), generator)
        plain = torch.stack(
            [(codes[:, j] - zeros[g]) * scale[g] for j, g in enumerate(groups.tolist())], dim=1
        )
        parts = {
            "qweight": to_words(codes, bits).T,
            "qzeros": to_words(zeros - offset, bits),
            "scales": scale,
            "g_idx": groups.int(),
        }
        return parts, plain

    return pack


def awq(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
    d_out, d_in = weight.shape
    codes, zeros = draw((d_in, d_out), 16, generator), draw((d_in // 8, d_out), 16, generator)
    scale = steps((d_in // 8, d_out), generator)
    plain = ((codes - zeros.repeat_interleave(8, 0)) * scale.repeat_interleave(8, 0)).T
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # of eight outputs, from the lowest bits of a word up

    def words(values: Tensor) -> Tensor:
        return to_words(values.reshape(len(values), -1, 8)[:, :, order].flatten(1), 4)

    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scale}, plain


def fp8(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
    codes = weight.to(torch.float8_e4m3fn)
    scale = steps((-(-weight.shape[0] // 16), -(-weight.shape[1] // 32)), generator)
    spread = scale.repeat_interleave(16, 0).repeat_interleave(32, 1)[: weight.shape[0], : weight.shape[1]]
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [False, True])
def test_gptq(tmp_path: Path, bits: int, order: bool) -> None:
    made = make(tmp_path / "m", gptq(bits, order=order), {**GPTQ, "bits": bits, "desc_act": order})
    found = require_same(made, tmp_path / "off").quantized(1)["mlp.up_proj.weight"]
    assert (found.scheme, found.num_bits, found.granularity, found.group_size) == (
        f"int{bits}",
        bits,
        "group",
        8,
    )


def test_gptq_of_the_second_version_stores_its_zero_points_as_they_are(tmp_path: Path) -> None:
    require_same(
        make(tmp_path / "m", gptq(offset=0), {**GPTQ, "checkpoint_format": "gptq_v2"}), tmp_path / "off"
    )


def test_awq(tmp_path: Path) -> None:
    require_same(make(tmp_path / "m", awq, AWQ, intermediate_size=64), tmp_path / "off")


def test_squares_of_8_bit_floats(tmp_path: Path) -> None:
    made = make(tmp_path / "m", fp8, {"quant_method": "fp8", "weight_block_size": [16, 32]})
    model = require_same(made, tmp_path / "off")
    assert {m.scheme for m in model.all_quantized()} == {"fp8_e4m3"}
    assert precision_of(open_checkpoint(made.directory)).notes


def torchao(
    kind: str, target: str | None, codes_of: Callable[[Tensor], Tensor]
) -> tuple[Pack, dict[str, Any]]:
    """The layout that transformers 5 writes with torchao 0.18: parts by name, classes in the header."""
    data: dict[str, Any] = {"block_size": [1, 16], "act_quant_kwargs": None}
    if target:
        data["target_dtype"] = {"_type": "torch.dtype", "_data": target}

    def pack(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
        codes = codes_of(weight)
        scale = steps((weight.shape[0], weight.shape[1] // 16), generator)
        plain = codes.float() * scale.repeat_interleave(16, 1)
        return {"_weight_qdata": codes, "_weight_scale": scale}, plain

    return pack, {"_type": kind, "_data": data, "_tensor_data_names": ["qdata", "scale"]}


@pytest.mark.parametrize(
    ("kind", "target", "codes_of", "scheme"),
    [
        ("Int8Tensor", None, lambda w: (40 * w).round().clamp(-128, 127).to(torch.int8), "int8"),
        ("IntxUnpackedToInt8Tensor", "int4", lambda w: (9 * w).round().clamp(-8, 7).to(torch.int8), "int4"),
        ("Float8Tensor", None, lambda w: w.to(torch.float8_e4m3fn), "fp8_e4m3"),
    ],
)
def test_torchao(
    tmp_path: Path, kind: str, target: str | None, codes_of: Callable[[Tensor], Tensor], scheme: str
) -> None:
    pack, entry = torchao(kind, target, codes_of)
    made = make(tmp_path, pack, {"quant_method": "torchao"})
    with_header(tmp_path, entry)
    model = require_same(made, tmp_path / "off")
    assert {(m.scheme, m.group_size) for m in model.all_quantized()} == {(scheme, 16)}


def with_header(directory: Path, entry: dict[str, Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    names = [n.replace("._weight_qdata", ".weight") for n in tensors if n.endswith("._weight_qdata")]
    write(directory, tensors, {"quant_method": "torchao"}, **{n: json.dumps(entry) for n in names})


def test_a_torchao_tensor_laid_out_for_one_kernel_is_refused(tmp_path: Path) -> None:
    pack, entry = torchao("Int8Tensor", None, lambda w: w.round().to(torch.int8))
    make(tmp_path, pack, {"quant_method": "torchao"})
    with_header(tmp_path, {**entry, "_type": "Int4TilePackedTo4dTensor"})
    assert "Int4TilePackedTo4dTensor" in refusal(tmp_path)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(1, 70), seed=st.integers(0, 9))
def test_words_of_any_width_come_apart_as_they_were_put_together(bits: int, count: int, seed: int) -> None:
    codes = draw((3, count), 2**bits, torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_rows(to_words(codes, bits), bits, count).long(), codes)


# -- refused ---------------------------------------------------------------------------------------------------------


def read_all(directory: Path) -> None:
    model = opened(directory, directory / "off")
    for layer in range(1, model.num_layers + 1):
        model.read_weights(layer)


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_all(directory)
    return str(caught.value)


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "mxfp4", "a-method-of-tomorrow", None, 7])
def test_a_method_that_is_not_unpacked_is_named(tmp_path: Path, method: object) -> None:
    made = make(tmp_path, gptq(), {"quant_method": method})
    assert repr(method) in refusal(made.directory)


def test_packed_tensors_of_which_the_config_says_nothing(tmp_path: Path) -> None:
    made = make(tmp_path, gptq(), None)
    assert "no quantization_config" in refusal(made.directory)


def test_integers_that_pass_for_a_weight(tmp_path: Path) -> None:
    made = make(tmp_path, lambda w, _: ({"weight": w.to(torch.int8)}, w), None)
    assert "no quantization_config" in refusal(made.directory)


@pytest.mark.parametrize("settings_", [GPTQ, AWQ, {"quant_method": "bitnet"}, {"quant_method": "fp8"}])
def test_a_config_that_says_so_over_plain_weights(tmp_path: Path, settings_: dict[str, Any]) -> None:
    made = make(tmp_path, lambda w, _: ({"weight": w}, w), settings_)
    assert "no packed weight" in refusal(made.directory)


def test_tensors_of_another_format_are_not_passed_over(tmp_path: Path) -> None:
    made = make(tmp_path, gptq(), GPTQ)
    tensors = load_file(made.directory / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.absmax"] = torch.ones(3)
    write(made.directory, tensors, GPTQ)
    assert "absmax" in refusal(made.directory)


HURT: dict[str, Callable[[Parts], Any]] = {
    "steps of another weight": lambda t: t.update({"q.scales": torch.ones(7, 32)}),
    "zero points cut": lambda t: t.update({"q.qzeros": t["q.qzeros"][:, :-1]}),
    "one group too many": lambda t: t.update({"q.g_idx": t["q.g_idx"] + 1}),
    "groups below zero": lambda t: t.update({"q.g_idx": t["q.g_idx"] - 1}),
    "groups of another weight": lambda t: t.update({"q.g_idx": t["q.g_idx"][:-1]}),
    "codes of another type": lambda t: t.update({"q.qweight": t["q.qweight"].float()}),
    "codes of three axes": lambda t: t.update({"q.qweight": t["q.qweight"].unsqueeze(0)}),
    "no codes at all": lambda t: t.update({"q.qweight": t["q.qweight"][:0]}),
    "zero points gone": lambda t: t.pop("q.qzeros"),
}


@pytest.mark.parametrize("how", HURT)
def test_a_damaged_weight_is_an_error_that_names_it(tmp_path: Path, how: str) -> None:
    made = make(tmp_path, gptq(), GPTQ)
    prefix = "model.layers.1.self_attn.q_proj"
    tensors = load_file(made.directory / "model.safetensors")
    own = {"q" + k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
    HURT[how](own)
    write(made.directory, tensors | {prefix + k[1:]: v.contiguous() for k, v in own.items()}, GPTQ)
    said = refusal(made.directory)
    assert prefix in said or "self_attn.q_proj.weight" in said or "packed codes" in said


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_config_says_it_ends_in_one_kind_of_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("m")
    prefix, value = "model.layers.0.self_attn.q_proj", torch.ones(8, 8)
    (directory / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    odd = st.sampled_from([None, -1, 0, 3, 4, 10**9, "x", [], {}, [1, 2], True, 2.5])
    method = data.draw(st.sampled_from(["gptq", "awq", "bitnet", "fp8", "compressed-tensors", "torchao"]))
    keys = [
        "bits",
        "group_size",
        "checkpoint_format",
        "version",
        "format",
        "weight_block_size",
        "linear_class",
    ]
    keys += ["config_groups", "sparsity_config", "modules_to_not_convert", "quantization_mode"]
    chosen = data.draw(st.dictionaries(st.sampled_from(keys), odd))
    parts = [
        "weight",
        "weight_scale",
        "weight_packed",
        "weight_shape",
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
    ]
    names = data.draw(st.lists(st.sampled_from([*parts, "weight_scale_inv"]), min_size=1, unique=True))
    write(directory, {f"{prefix}.{n}": value.clone() for n in names}, {"quant_method": method, **chosen})
    try:
        packing = find_packing(open_checkpoint(directory))
        for weight in packing.weights if packing else ():
            weight.decode(dict.fromkeys(weight.parts, value))
    except CheckpointError:
        pass


# -- what is kept of it ------------------------------------------------------------------------------------------------


def test_it_is_unpacked_once_and_again_when_a_file_has_changed(tmp_path: Path) -> None:
    made = make(tmp_path / "m", gptq(), GPTQ)
    first = opened(made.directory, tmp_path / "off").plain_directory
    stamp = (first / "config.json").stat().st_mtime_ns
    assert opened(made.directory, tmp_path / "off").plain_directory == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    before = logits(opened(made.directory, tmp_path / "off"), torch.ones(1, 4, dtype=torch.long))
    tensors = load_file(made.directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"] *= 2
    write(made.directory, tensors, GPTQ)
    model = opened(made.directory, tmp_path / "off")
    assert model.plain_directory != first
    assert not torch.equal(before, logits(model, torch.ones(1, 4, dtype=torch.long)))
    assert not list((tmp_path / "off").glob("*.partial"))


@pytest.mark.parametrize(
    ("pack", "settings_"),
    [
        (gptq(3), {**GPTQ, "bits": 3}),
        (awq, AWQ),
        (fp8, {"quant_method": "fp8", "weight_block_size": [16, 32]}),
    ],
)
def test_the_size_of_what_it_is_unpacked_to_is_known_beforehand(
    tmp_path: Path, pack: Pack, settings_: dict[str, Any]
) -> None:
    made = make(tmp_path, pack, settings_, intermediate_size=64)
    files = open_checkpoint(made.directory)
    expected = sum(value.numel() for value in made.plain.state_dict().values())
    assert sum(plain_numel(files, find_packing(files)).values()) == expected


def test_what_was_found_in_a_weight(tmp_path: Path) -> None:
    def pack(weight: Tensor, generator: torch.Generator) -> tuple[Parts, Tensor]:
        parts, plain = gptq()(weight, generator)
        if (
            weight.shape[0] == weight.shape[1]
        ):  # q and o: a quarter of the codes at their zero point, one step large
            parts["qzeros"] = torch.zeros_like(parts["qzeros"])
            codes = torch.arange(1, 5).repeat(weight.shape[0], weight.shape[1] // 4)
            parts["qweight"] = to_words(codes, 4).T
            parts["scales"] = torch.full_like(parts["scales"], 0.1)
            parts["scales"][0, 0] = 1.0
            plain = (codes - 1) * parts["scales"].repeat_interleave(8, 0).T
        return parts, plain

    model = require_same(make(tmp_path / "m", pack, GPTQ), tmp_path / "off")
    found = model.quantized(2)["self_attn.q_proj.weight"]
    assert (found.name, found.layer) == ("model.layers.1.self_attn.q_proj", 2)
    assert found.zeros == 0.25
    assert found.scale == pytest.approx(0.1)
    assert found.scale_outliers == pytest.approx(1 / 128)
    assert found.clipped is None
