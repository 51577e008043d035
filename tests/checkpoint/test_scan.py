"""The hashes tell checkpoints, layers and tensors apart by content alone; what is not finite is counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peelcli.checkpoint import scan as scan_module
from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.scan import ScanResult, run_scan, scan

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
State = dict[str, torch.Tensor]
fuzz = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def slice_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setattr(scan_module, "SLICE_BYTES", size)


def small_state(num_layers: int = 3) -> State:
    torch.manual_seed(0)
    state = {"embed.weight": torch.randn(7, 4)}
    for i in range(num_layers):
        state[f"layers.{i}.q.weight"] = torch.randn(4, 4).to(torch.bfloat16)
        state[f"layers.{i}.norm.weight"] = torch.ones(4)
    return state


def scan_state(directory: Path, state: State, **config: object) -> ScanResult:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": 3, **config}))
    save_file({k: v.contiguous() for k, v in state.items()}, directory / "model.safetensors")
    return scan(open_checkpoint(directory))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "opt"])
def test_a_sound_model_has_no_findings(save_model: Callable[..., Path], family: str) -> None:
    directory = save_model(family)
    state = load_file(directory / "model.safetensors")
    result = scan(open_checkpoint(directory))
    own = {n: t for n, t in state.items() if ".layers." in n or ".h." in n}
    assert result.findings == ()
    assert list(result.layer_hashes) == [1, 2, 3] == list(result.layer_num_parameters)
    assert len(set(result.layer_hashes.values())) == 3
    assert sum(result.layer_num_parameters.values()) == sum(t.numel() for t in own.values())
    assert result.num_parameters == sum(t.numel() for t in state.values())
    assert result.total_nbytes == sum(t.nbytes for t in state.values())
    assert result.num_tensors == len(state) == len(result.tensor_hashes)
    assert len(result.checkpoint_id) == 16


def test_real_weights_have_no_findings(shared: Path) -> None:
    files = open_checkpoint(shared / "stories260K-hf")
    result = scan(files)
    assert result.findings == ()
    assert result.layer_num_parameters == dict.fromkeys(range(1, 6), 45440)


def test_a_hash_does_not_depend_on_format_or_shards(save_model: Callable[..., Path], tmp_path: Path) -> None:
    whole = save_model("llama").rename(tmp_path / "whole")
    shards, pickled = save_model("llama", shard="10KB"), tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((whole / "config.json").read_text())
    state = load_file(whole / "model.safetensors")
    strided = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in state.items()}
    torch.save(strided, pickled / "pytorch_model.bin")
    a, b, c = (scan(open_checkpoint(d)) for d in (whole, shards, pickled))
    assert len(open_checkpoint(shards).files) > 3
    assert a.tensor_hashes == b.tensor_hashes == c.tensor_hashes
    assert a.layer_hashes == b.layer_hashes == c.layer_hashes
    assert a.checkpoint_id == b.checkpoint_id == c.checkpoint_id


@fuzz
@given(
    size=st.integers(1, 300),
    shape=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from([*FLOATS, torch.int8, torch.bool, torch.complex64]),
)
def test_a_hash_does_not_depend_on_the_slices(
    tmp_path: Path, slice_bytes: Callable[[int], None], size: int, shape: list[int], dtype: torch.dtype
) -> None:
    state = {"x": torch.randn(shape).to(dtype), "y": torch.zeros(3)}
    slice_bytes(2**26)
    whole = scan_state(tmp_path, state)
    slice_bytes(size)
    assert scan_state(tmp_path, state) == whole


@fuzz
@given(data=st.data())
def test_one_bit_changes_one_tensor_one_layer_and_the_id(tmp_path: Path, data: st.DataObject) -> None:
    state = small_state()
    before = scan_state(tmp_path, state)
    name = data.draw(st.sampled_from(sorted(state)))
    raw = state[name].view(torch.uint8).view(-1)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    after = scan_state(tmp_path, state)
    assert {n for n in state if before.tensor_hashes[n] != after.tensor_hashes[n]} == {name}
    layers = {n for n in (1, 2, 3) if before.layer_hashes[n] != after.layer_hashes[n]}
    assert layers == ({int(name.split(".")[1]) + 1} if name.startswith("layers") else set())
    assert before.checkpoint_id != after.checkpoint_id


def test_dtype_shape_and_name_count_too(tmp_path: Path) -> None:
    x = torch.arange(6, dtype=torch.int16)
    variants = [{"x": x}, {"x": x.view(torch.bfloat16)}, {"x": x.view(2, 3)}, {"x": x.view(3, 2)}]
    results = [scan_state(tmp_path, v) for v in variants]
    assert len({r.tensor_hashes["x"] for r in results}) == 4
    renamed = scan_state(tmp_path, {"y": x})
    assert renamed.tensor_hashes["y"] == results[0].tensor_hashes["x"]
    assert renamed.checkpoint_id != results[0].checkpoint_id


def test_the_id_follows_the_architecture_and_not_the_machine(tmp_path: Path) -> None:
    state, base = small_state(), {"rope": {"theta": 1e4, "dtype": "float32"}}
    result = scan_state(tmp_path, state, **base)
    noise = {"torch_dtype": "bfloat16", "use_cache": False, "_name_or_path": "x", "transformers_version": "9"}
    same = scan_state(tmp_path, state, **noise, rope={"dtype": "float16", "theta": 1e4})
    other = scan_state(tmp_path, state, rope={"theta": 1e6})
    assert same.checkpoint_id == result.checkpoint_id != other.checkpoint_id


@fuzz
@given(data=st.data(), dtype=st.sampled_from(FLOATS), size=st.sampled_from([1, 16, 40, 2**26]))
def test_every_nan_and_infinity_is_counted(
    tmp_path: Path, slice_bytes: Callable[[int], None], data: st.DataObject, dtype: torch.dtype, size: int
) -> None:
    slice_bytes(size)
    bad = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), float("-inf")]
    values = data.draw(st.lists(st.sampled_from([0.0, 1.0, -2.0, *bad]), min_size=24, max_size=24))
    x = torch.tensor(values, dtype=torch.float64).reshape(4, 6)
    state = {**small_state(), "layers.1.q.weight": x.to(dtype)}
    found = [f for f in scan_state(tmp_path, state).findings if f.kind == "non-finite"]
    nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
    assert len(found) == (nan + inf > 0)
    for finding in found:
        assert (finding.layer, finding.tensor) == (2, "layers.1.q.weight")
        assert f"(layer 2) holds {nan} NaN and {inf} infinite of 24 values" in finding.message


def test_what_is_not_finite_outside_the_layers_is_found_as_well(tmp_path: Path) -> None:
    state = small_state()
    state["embed.weight"][6, 3] = float("nan")
    (finding,) = scan_state(tmp_path, state).findings
    assert (finding.kind, finding.layer, finding.tensor) == ("non-finite", None, "embed.weight")


def test_integers_are_hashed_and_not_judged(tmp_path: Path) -> None:
    state = small_state()
    for i in range(3):
        state[f"layers.{i}.qweight"] = torch.full((4, 4), -1, dtype=torch.int32)  # a NaN, read as a float
        state[f"layers.{i}.mask"] = torch.ones(4, 4, dtype=torch.bool)
    assert scan_state(tmp_path, state).findings == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_constant_matrix_is_found(
    tmp_path: Path, slice_bytes: Callable[[int], None], dtype: torch.dtype, value: float
) -> None:
    slice_bytes(5)
    state = {**small_state(), "layers.2.q.weight": torch.full((4, 4), value).to(dtype)}
    (finding,) = scan_state(tmp_path, state).findings
    assert (finding.kind, finding.layer, finding.tensor) == ("constant", 3, "layers.2.q.weight")
    assert f"is {value:g} throughout" in finding.message
    state["layers.2.q.weight"][3, 3] = 1.0  # one value suffices, be it in the last slice
    state.update({f"layers.{i}.scale": torch.ones(1, 1) for i in range(3)})
    assert scan_state(tmp_path, state).findings == ()


def test_copied_layers_are_found_under_their_first_number(tmp_path: Path) -> None:
    state = small_state(4)
    for name in ("q", "norm"):
        for copy in (1, 3):
            state[f"layers.{copy}.{name}.weight"] = state[f"layers.0.{name}.weight"].clone()
    found = scan_state(tmp_path, state, num_hidden_layers=4).findings
    assert [(f.kind, f.layer) for f in found] == [("duplicate-layer", 2), ("duplicate-layer", 4)]
    assert "layer 4 is, byte for byte, layer 1" in found[1].message
    state["layers.3.q.weight"][0, 0] += 1
    assert [f.layer for f in scan_state(tmp_path, state, num_hidden_layers=4).findings] == [2]


@pytest.mark.parametrize(
    ("order", "faults"),
    [
        ("01230123", []),  # as many again in the same order
        ("0123450123", []),  # the first four once more, at the end
        ("0000", []),  # one block for all layers
        ("0123411", [7, 6]),  # one odd pair, and a third copy of it
        ("0120", [4]),
        ("00", [2]),
    ],
)
def test_blocks_that_a_network_shares_by_design_are_a_note(
    tmp_path: Path, order: str, faults: list[int]
) -> None:
    torch.manual_seed(0)
    blocks = {kind: torch.randn(4, 4) for kind in set(order)}
    state = {f"layers.{i}.q.weight": blocks[kind].clone() for i, kind in enumerate(order)}
    found = scan_state(tmp_path, state, num_hidden_layers=len(order)).findings
    assert {f.layer for f in found if f.kind == "duplicate-layer"} == set(faults)
    assert [f.kind for f in found if f.layer is None] == ([] if faults else ["shared-layers"])
    grouped = scan_state(tmp_path, state, num_hidden_layers=len(order), num_hidden_groups=1).findings
    assert {f.kind for f in grouped} == {"shared-layers"}


def test_the_id_is_that_of_the_weights_and_the_architecture(tmp_path: Path) -> None:
    state = small_state()
    a = scan_state(tmp_path / "step-1", state)
    assert scan_state(tmp_path / "step-2", state, use_cache=False).checkpoint_id == a.checkpoint_id
    assert scan_state(tmp_path / "step-3", state, rope_theta=5.0).checkpoint_id != a.checkpoint_id
    state["layers.0.q.weight"] += 1
    moved = scan_state(tmp_path / "step-4", state)
    assert moved.checkpoint_id != a.checkpoint_id
    assert [n for n in (1, 2, 3) if moved.layer_hashes[n] != a.layer_hashes[n]] == [1]


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    state = small_state()
    result = scan_state(tmp_path, state)
    seen = list(run_scan(open_checkpoint(tmp_path)))
    assert {event.detail for event in seen} == state.keys()
    assert [event.done for event in seen] == sorted(event.done for event in seen)
    assert (seen[-1].done, seen[-1].total) == (result.total_nbytes, result.total_nbytes)


MIB = 2**20


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("count", "shape", "dtype", "limit"),
    [
        (2, (2**14, 2**10), torch.float32, 24 * MIB),  # large tensors, in slices of rows
        (64, (2**18,), torch.float32, 24 * MIB),  # many small ones, a few at a time
        (
            1,
            (1, 2**25),
            torch.float8_e5m2,
            96 * MIB,
        ),  # one row of 32 MiB, which would take 128 more as float32
    ],
)
def test_memory_does_not_grow_with_the_checkpoint(
    tmp_path: Path,
    slice_bytes: Callable[[int], None],
    name: str,
    count: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    limit: int,
) -> None:
    peak = Path("/proc/self/clear_refs")  # writing 5 resets VmHWM, the most memory the process ever held
    if not os.access(peak, os.W_OK):
        pytest.skip("needs a Linux kernel that resets the peak")
    (tmp_path / "config.json").write_text("{}")
    state = {f"x{i}": torch.ones(shape).to(dtype) for i in range(count)}
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    del state
    slice_bytes(MIB)
    files = open_checkpoint(tmp_path)
    peak.write_text("5")
    before = memory("VmRSS")
    assert scan(files).num_tensors == count
    assert memory("VmHWM") - before < limit


def memory(key: str) -> int:
    """Bytes that /proc/self/status gives under `key`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
