"""Layers are told by the numbers in names; what one layer alone lacks is missed, other gaps are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peelcli.checkpoint.files import CheckpointFiles, TensorInfo
from peelcli.checkpoint.layers import group_by_layer
from peelcli.errors import CheckpointError

BLOCK = {"attn.weight": (8, 8), "mlp.weight": (8, 16), "norm.weight": (8,)}


def tensor(name: str, *shape: int) -> tuple[str, tuple[int, ...]]:
    return name, shape


def files(*named: tuple[str, tuple[int, ...]], **config: object) -> CheckpointFiles:
    tensors = {
        name: TensorInfo(name, Path("model.safetensors"), "bfloat16", shape, 0) for name, shape in named
    }
    return CheckpointFiles(Path("ckpt"), dict(config), tensors, "safetensors", (Path("model.safetensors"),))


def stack(
    prefix: str, layers: int, block: dict[str, tuple[int, ...]] = BLOCK
) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{prefix}{i}.{name}", shape) for i in range(layers) for name, shape in block.items()]


def names(ckpt: CheckpointFiles, num_layers: int | None = None) -> dict[int, set[str]]:
    layers, findings = group_by_layer(ckpt, num_layers)
    assert findings == []
    return {layer: {info.name for info in members.values()} for layer, members in layers.items()}


@given(st.integers(1, 30), st.sampled_from(["", "model.layers.", "transformer.h.", "a.0.b."]), st.randoms())
def test_every_tensor_of_the_stack_lands_in_its_layer(count: int, prefix: str, random: object) -> None:
    named = stack(prefix, count)
    random.shuffle(named)
    found = names(files(tensor("embed.weight", 999, 8), *named, num_hidden_layers=count))
    assert found == {i + 1: {f"{prefix}{i}.{name}" for name in BLOCK} for i in range(count)}
    assert list(found) == sorted(found)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"])
def test_the_count_is_read_wherever_configs_keep_it(key: str) -> None:
    vision = stack("vision.layers.", 9, {"attn.weight": (99, 99)})
    named = [*vision, *stack("text.layers.", 3)]
    for config in ({key: 3}, {"text_config": {key: 3}}, {"text_config": {key: 3}, "num_layers": 5}):
        assert names(files(*named, **config))[3] == {f"text.layers.2.{name}" for name in BLOCK}
    assert list(names(files(*named, **{key: 3}), num_layers=9)) == list(range(1, 10))


def test_without_a_count_the_largest_unbroken_stack_is_taken() -> None:
    named = [*stack("a.", 3), *stack("b.", 4), tensor("c.1.weight", 999, 999)]
    assert list(names(files(*named))) == [1, 2, 3, 4]


def test_experts_belong_to_the_layer_around_them() -> None:
    block = {"attn.weight": (8, 8), **{f"experts.{e}.w1.weight": (8, 8) for e in range(3)}}
    found = names(files(*stack("model.layers.", 3, block), num_hidden_layers=3))
    assert found[3] == {f"model.layers.2.{name}" for name in block}


def test_wrappers_do_not_count() -> None:
    plain, _ = group_by_layer(files(*stack("model.layers.", 3), num_hidden_layers=3))
    for prefix in ("_orig_mod.", "module.", "module._orig_mod.module.", "_orig_mod.module."):
        wrapped, _ = group_by_layer(files(*stack(f"{prefix}model.layers.", 3), num_hidden_layers=3))
        assert {n: list(m) for n, m in wrapped.items()} == {n: list(m) for n, m in plain.items()}
    block = {f"_orig_mod.{name}": shape for name, shape in BLOCK.items()}  # each block compiled by itself
    wrapped, _ = group_by_layer(files(*stack("model.layers.", 3, block), num_hidden_layers=3))
    assert list(wrapped[2]) == list(plain[2])


@given(st.integers(3, 8), st.data())
def test_a_tensor_that_one_layer_lacks_is_missed(count: int, data: st.DataObject) -> None:
    layer, name = (
        data.draw(st.integers(0, count - 1)),
        data.draw(st.sampled_from(["attn.weight", "mlp.weight"])),
    )
    hole = f"model.layers.{layer}.{name}"
    named = [t for t in stack("model.layers.", count) if t[0] != hole]
    with pytest.raises(CheckpointError, match=f"incomplete: layer {layer + 1} lacks {hole}"):
        group_by_layer(files(*named, num_hidden_layers=count))


@given(st.integers(2, 8), st.data())
def test_a_layer_that_is_missing_is_named(count: int, data: st.DataObject) -> None:
    gone = data.draw(st.integers(0, count - 1))
    named = [t for t in stack("model.layers.", count) if not t[0].startswith(f"model.layers.{gone}.")]
    said = rf"layer {gone + 1} \(model.layers.{gone}\) has no tensors"
    with pytest.raises(CheckpointError, match=said):
        group_by_layer(files(*named, num_hidden_layers=count))


def test_layers_of_several_kinds_are_no_holes() -> None:
    sparse = {"attn.weight": (8, 8), "experts.0.weight": (8, 8), "experts.1.weight": (8, 8)}
    dense_first = [*stack("layers.", 1), *(t for t in stack("layers.", 5, sparse) if "layers.0" not in t[0])]
    two_without = [
        t for t in stack("layers.", 5) if t[0] not in ("layers.1.mlp.weight", "layers.3.mlp.weight")
    ]
    no_first_norm = [t for t in stack("layers.", 5) if t[0] != "layers.0.norm.weight"]
    one_richer = [*stack("layers.", 5), tensor("layers.0.pre_norm.weight", 8)]
    pair = [t for t in stack("layers.", 2) if t[0] != "layers.1.mlp.weight"]
    for named in (dense_first, two_without, no_first_norm, one_richer):
        assert list(names(files(*named, num_hidden_layers=5))) == [1, 2, 3, 4, 5]
    assert list(names(files(*pair, num_hidden_layers=2))) == [1, 2]
    named = [t for t in stack("layers.", 5) if t[0] != "layers.1.norm.weight"]
    with pytest.raises(CheckpointError, match=r"layer 2 lacks layers.1.norm.weight"):
        group_by_layer(files(*named, num_hidden_layers=5))


def test_layers_beyond_the_config_are_told() -> None:
    named = stack("model.layers.", 5)
    layers, (finding,) = group_by_layer(files(*named, num_hidden_layers=3))
    assert (list(layers), finding.kind) == ([1, 2, 3], "surplus-layers")
    assert "2 more, from model.layers.3 on" in finding.message
    predicted = files(*named, num_hidden_layers=3, num_nextn_predict_layers=2)  # DeepSeek's extra heads
    assert list(names(predicted)) == [1, 2, 3]


def test_layers_that_no_name_tells_are_told() -> None:
    shared = [tensor("groups.0.attn.weight", 8, 8), tensor("embed.weight", 9, 8)]  # as ALBERT shares its one
    for ckpt in (files(*shared, num_hidden_layers=12), files(tensor("x", 3)), files(tensor("x.7.y", 3))):
        layers, (finding,) = group_by_layer(ckpt)
        assert (layers, finding.kind) == ({}, "layers-unknown")


def test_hostile_names_do_no_harm() -> None:
    odd = ["9" * 5000, "٣.x", "².x", "-1.x", "..0..", "", ".", "model.layers.00.x"]
    found = names(
        files(*(tensor(name, 2, 2) for name in odd), *stack("model.layers.", 3), num_hidden_layers=3)
    )
    assert list(found) == [1, 2, 3]
