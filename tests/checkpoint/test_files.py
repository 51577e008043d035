"""Whatever lies in the directory: it is opened whole, or refused with a reason; nothing in it is executed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peelcli.checkpoint.files import open_checkpoint, read_tensor
from peelcli.errors import CheckpointError

INDEX = "model.safetensors.index.json"
TENSORS = {
    "model.layers.0.w.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "model.layers.0.b": torch.tensor([1.5, -2.0]).to(torch.bfloat16),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(directory: Path, name: str, tensors: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    if name.endswith(".safetensors"):
        save_file(tensors, directory / name, metadata={"format": "pt"})
    else:
        torch.save(tensors, directory / name)
    return directory


def write_shards(directory: Path, index: str = INDEX, suffix: str = ".safetensors") -> Path:
    first, second = f"a{suffix}", f"b{suffix}"
    write(directory, first, {"x": torch.ones(2, 2)})
    write(directory, second, {"y": torch.zeros(3)})
    set_index(directory, {"x": first, "y": second}, index)
    return directory


def set_index(directory: Path, weight_map: object, index: str = INDEX) -> None:
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    return str(caught.value)


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_saved_models_are_read_back_exactly(save_model: Callable[..., Path], shard: str) -> None:
    directory = save_model("llama", shard=shard)
    files = open_checkpoint(directory)
    saved = {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
    assert len(saved) > 20
    assert files.format == "safetensors"
    assert (len(files.files) > 1) == (shard == "10KB")
    assert files.config["num_hidden_layers"] == 3
    assert files.tensors.keys() == saved.keys()
    for name, info in files.tensors.items():
        assert torch.equal(read_tensor(info), saved[name])
        assert (info.shape, info.numel) == (tuple(saved[name].shape), saved[name].numel())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_dtype_shape_and_bytes_are_those_of_the_tensor(tmp_path: Path, name: str) -> None:
    files = open_checkpoint(write(tmp_path, name, TENSORS))
    for key, tensor in TENSORS.items():
        info = files.tensors[key]
        expected = (f"torch.{info.dtype}", info.shape, info.nbytes)
        assert expected == (str(tensor.dtype), tuple(tensor.shape), tensor.nbytes)
        assert torch.equal(read_tensor(info), tensor)
    matrix = files.tensors["model.layers.0.w.weight"]
    assert torch.equal(read_tensor(matrix, slice(1, 3)), TENSORS[matrix.name][1:3])


def test_pickles_from_before_torch_1_6_are_read(tmp_path: Path) -> None:
    write(tmp_path, "pytorch_model.bin", TENSORS)
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    files = open_checkpoint(tmp_path)
    assert all(torch.equal(read_tensor(files.tensors[k]), t) for k, t in TENSORS.items())


def test_sharded_pickles(tmp_path: Path) -> None:
    files = open_checkpoint(write_shards(tmp_path, "pytorch_model.bin.index.json", ".bin"))
    assert (files.format, [f.name for f in files.files]) == ("pickle", ["a.bin", "b.bin"])
    assert torch.equal(read_tensor(files.tensors["y"]), torch.zeros(3))


def test_order_of_preference_is_that_of_transformers(tmp_path: Path) -> None:
    write(tmp_path, "pytorch_model.bin", {"from": torch.tensor(3)})
    write_shards(tmp_path)
    assert open_checkpoint(tmp_path).tensors.keys() == {"x", "y"}
    write(tmp_path, "model.safetensors", {"from": torch.tensor(1)})
    assert read_tensor(open_checkpoint(tmp_path).tensors["from"]) == 1
    write(tmp_path, "other.safetensors", {"from": torch.tensor(2)})
    (tmp_path / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert read_tensor(open_checkpoint(tmp_path).tensors["from"]) == 2


def test_missing_directory_file_and_config(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nowhere")
    write(tmp_path, "model.safetensors", TENSORS)
    assert str(tmp_path) in refusal(tmp_path / "model.safetensors").split("name the directory")[1]
    (tmp_path / "config.json").unlink()
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"a"', "[" * 100_000, "{'a': 1}"])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_no_object(tmp_path: Path, name: str, text: str) -> None:
    write_shards(tmp_path)
    (tmp_path / name).write_text(text)
    assert name in refusal(tmp_path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("mp_rank_00_model_states.pt", "zero_to_fp32"),
        ("global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32"),
        ("iter_0000100/mp_rank_00/model_optim_rng.pt", "Megatron"),
        ("model_optim_rng.pt", "Megatron"),
        ("__0_0.distcp", "dcp_to_torch"),
        (".metadata", "dcp_to_torch"),
        ("pytorch_model_fsdp_0/.metadata", "dcp_to_torch"),
        ("epoch=1.ckpt", "Lightning"),
        ("model-q4.gguf", "gguf_file"),
        ("ckpt.pt", "nanoGPT"),
        ("adapter_model.safetensors", "merge_and_unload"),
        ("tf_model.h5", "TensorFlow"),
        ("consolidated.00.pth", "original Llama"),
        ("model-00001-of-00002.safetensors", "index is missing"),
        ("weights.safetensors", "rename"),
        ("weights.pth", "PyTorch file"),
        ("checkpoint-500/config.json", "checkpoint-… directories"),
    ],
)
def test_foreign_formats_are_named_with_the_way_out(tmp_path: Path, path: str, said: str) -> None:
    assert said not in refusal(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(b"x")
    assert said in refusal(tmp_path)  # no config.json
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path)
    assert said in message
    assert path.split("/")[0] in message
    assert "no weights found, expected model.safetensors" in message
    if (tmp_path / path).parent == tmp_path and said not in ("index is missing", "rename", "PyTorch file"):
        assert said in refusal(tmp_path / path)


def test_every_listed_shard_must_be_there(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert "1 of 2 weight files are missing: b.safetensors." in refusal(tmp_path)
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "gone")
    assert "b.safetensors (a dangling link)" in refusal(tmp_path)


def test_a_dangling_link_to_the_only_weights_is_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", TENSORS)
    (tmp_path / "model.safetensors").rename(tmp_path / "blob")
    (tmp_path / "model.safetensors").symlink_to("blobb")
    assert "model.safetensors (a dangling link)" in refusal(tmp_path)


def test_a_hub_cache_is_opened_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = write_shards(tmp_path / "blobs"), tmp_path / "snapshots"
    snapshot.mkdir()
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("..") / "blobs" / blob.name)
    files = open_checkpoint(snapshot)
    assert torch.equal(read_tensor(files.tensors["x"]), torch.ones(2, 2))


OUTSIDE = [
    "../out/a.safetensors",
    "sub/a.safetensors",
    "./a.safetensors",
    "a\\a.safetensors",
    "C:a.safetensors",
]


@pytest.mark.parametrize("name", [*OUTSIDE, "..", ".", "", "a.safetensors/", "a\0.safetensors", 5, None, "/"])
def test_an_index_leads_nowhere_else(tmp_path: Path, name: object) -> None:
    directory = write_shards(tmp_path / "ckpt")
    for folder in (tmp_path / "out", directory / "sub"):  # what it points to is there, and sound
        write(folder, "a.safetensors", {"x": torch.ones(2, 2)})
    set_index(directory, {"x": name, "y": "b.safetensors"})
    assert f"names the file {name!r}" in refusal(directory)
    (directory / "config.json").write_text(json.dumps({"transformers_weights": name or "../a"}))
    assert "plain file name" in refusal(directory)


def test_an_absolute_path_in_an_index_is_refused(tmp_path: Path) -> None:
    directory = write_shards(tmp_path)
    set_index(directory, {"x": str(directory / "a.safetensors")})
    assert "plain file name" in refusal(directory)


def test_an_index_that_does_not_match_its_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    set_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"})
    assert "b.safetensors holds 'z', but it does not" in refusal(tmp_path)
    set_index(tmp_path, {"x": "b.safetensors", "y": "a.safetensors"})
    assert "holds 'x', but a.safetensors does" in refusal(tmp_path)
    set_index(tmp_path, {"x": "a.safetensors", "y": "a.bin"})
    assert "expected shards in the safetensors format" in refusal(tmp_path)
    set_index(tmp_path, {})
    assert "no weight_map" in refusal(tmp_path)
    write(tmp_path, "b.safetensors", {"x": torch.zeros(1), "y": torch.zeros(3)})
    write(tmp_path, "a.safetensors", {"x": torch.zeros(1), "w": torch.zeros(3)})
    set_index(tmp_path, {"w": "a.safetensors", "y": "b.safetensors"})
    assert "'x' is also in a.safetensors" in refusal(tmp_path)
    assert "does not say which" in refusal(tmp_path)


def test_files_that_are_there_and_yet_are_not(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        directory = write(tmp_path / name, name, {})
        assert "holds no tensors" in refusal(directory)
        (directory / name).write_bytes(b"")
        assert "is empty" in refusal(directory)
        (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
        assert "git lfs pull" in refusal(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@fuzz
@given(data=st.data())
def test_a_truncated_file_is_refused_wherever_it_was_cut(
    tmp_path: Path, name: str, data: st.DataObject
) -> None:
    file = write(tmp_path, name, TENSORS) / name
    raw = file.read_bytes()
    file.write_bytes(raw[: data.draw(st.integers(1, len(raw) - 1))])
    _, message = refusal(tmp_path).split(name, 1)  # the directory is named after this test
    assert "truncated" in message or (name.endswith(".bin") and "damaged" in message)


@fuzz
@given(data=st.data())
def test_a_damaged_header_never_ends_in_another_error(tmp_path: Path, data: st.DataObject) -> None:
    file = write(tmp_path, "model.safetensors", TENSORS) / "model.safetensors"
    raw = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    try:
        files = open_checkpoint(tmp_path)
    except CheckpointError:
        return
    for info in files.tensors.values():  # still sound: a name or the metadata was hit
        assert read_tensor(info).nbytes == info.nbytes


@fuzz
@given(
    header=st.recursive(
        st.none() | st.integers() | st.text(), lambda j: st.lists(j) | st.dictionaries(st.text(), j)
    )
)
@example(header={"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}})
@example(header={"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}})
@example(header={"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**30]}})
def test_any_other_header_is_refused(tmp_path: Path, header: object) -> None:
    raw = json.dumps(header).encode()
    write(tmp_path, "model.safetensors", TENSORS)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"\1\2\3\4")
    refusal(tmp_path)


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("plain", [False, True])
def test_a_hostile_pickle_is_not_executed(tmp_path: Path, plain: bool) -> None:
    hostile = {"x": torch.zeros(2), "y": Hostile(f"touch {tmp_path / 'pwned'}")}
    write(tmp_path, "pytorch_model.bin", hostile)
    if plain:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(hostile["y"], protocol=2))
    message = refusal(tmp_path)
    assert "something other than tensors (posix.system)" in message
    assert "Nothing of it was executed" in message
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({"model": {"x": torch.zeros(2)}, "step": 3}, "entry 'model' is a dict"),
        ({3: torch.zeros(2)}, "entry 3"),
        ({"x": torch.eye(3).to_sparse()}, "not a plain dense tensor"),
        ({"x": torch.zeros(1).expand(10**12)}, "4,000,000,000,000 bytes in a file of"),
        ({"x": torch.zeros(2, device="meta")}, "not a plain dense tensor"),
    ],
)
def test_a_pickle_of_anything_else_is_refused(tmp_path: Path, state: object, said: str) -> None:
    assert said in refusal(write(tmp_path, "pytorch_model.bin", state))


@fuzz
@given(data=st.data())
def test_a_damaged_pickle_never_ends_in_another_error(tmp_path: Path, data: st.DataObject) -> None:
    state = {"x": torch.arange(4.0), "y": torch.zeros(2, 3, dtype=torch.int8)}
    file = write(tmp_path, "pytorch_model.bin", state) / "pytorch_model.bin"
    raw = bytearray(file.read_bytes())
    start = raw.index(b"\x80\x02")  # the pickle itself; the archive around it is plain
    raw[data.draw(st.integers(start, start + 250))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    with contextlib.suppress(CheckpointError):  # a name, or the version byte, may be hit and do no harm
        assert open_checkpoint(tmp_path).tensors
