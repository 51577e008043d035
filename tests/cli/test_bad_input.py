"""Bad input ends with one message that names the thing and the remedy, and leaves nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import transformers
from safetensors.torch import load_file, save_file
from tiny import AUDIT, EXTRACT, FIT, Done, leftovers, peel, save_ids, save_tiny

USAGE, FAILED = 2, 3


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards, and token ids beside it."""
    base = tmp_path_factory.mktemp("sound")
    save_tiny(base / "ckpt", shard="15KB")
    assert len(list((base / "ckpt").glob("model-*.safetensors"))) > 1
    save_ids(base / "ids.npy")
    return base


@pytest.fixture
def ckpt(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound checkpoint, to be damaged; its token ids lie beside it."""
    shutil.copyfile(sound / "ids.npy", tmp_path / "ids.npy")
    return Path(shutil.copytree(sound / "ckpt", tmp_path / "ckpt"))


def assert_refused(done: Done, code: int, *words: str) -> None:
    """Exit code, silence on stdout, and one message that holds all `words`."""
    assert (done.code, done.out) == (code, ""), done.err
    told = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, done.err
    message = done.err[done.err.index("error: ") :]
    for word in words:
        assert word in message
    assert "mistake in peel" not in message
    assert "Traceback" not in done.err


# -- checkpoints that cannot be opened ---------------------------------------------------------------------------------


def remove_config(ckpt: Path) -> None:
    (ckpt / "config.json").unlink()


def truncate_shard(ckpt: Path) -> None:
    shard = sorted(ckpt.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def remove_shard(ckpt: Path) -> None:
    sorted(ckpt.glob("model-*.safetensors"))[1].unlink()


def point_outside(ckpt: Path) -> None:
    index = ckpt / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../outside.safetensors"
    shutil.copyfile(next(ckpt.glob("model-*.safetensors")), ckpt.parent / "outside.safetensors")
    index.write_text(json.dumps(content))


def make_encoder(ckpt: Path) -> None:
    shutil.rmtree(ckpt)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertForMaskedLM(config).save_pretrained(ckpt)


def make_wider(ckpt: Path) -> None:
    config = json.loads((ckpt / "config.json").read_text())
    config["intermediate_size"] *= 2
    (ckpt / "config.json").write_text(json.dumps(config))


CHECKPOINTS: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (shutil.rmtree, ("ckpt: no such directory", "name a directory with config.json")),
    (remove_config, ("has no config.json", "expected config.json beside")),
    (make_encoder, ("'bert'", "is an encoder", "Audit such a checkpoint instead")),
    (truncate_shard, ("model-00002-of", "truncated", "copy or download")),
    (remove_shard, ("1 of", "missing: model-00002-of", "copy or download the checkpoint again")),
    (point_outside, ("../outside.safetensors", "nothing outside the checkpoint", "correct the entry")),
    (make_wider, ("mlp", "[16, 24]", "[16, 48]", "config.json", "come from the same run")),
]


@pytest.mark.parametrize(("damage", "words"), CHECKPOINTS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("command", ["audit", "extract"])
def test_a_checkpoint_that_cannot_be_opened_is_refused(
    command: str, damage: Callable[[Path], None], words: tuple[str, ...], ckpt: Path, tmp_path: Path
) -> None:
    damage(ckpt)
    settings = AUDIT if command == "audit" else EXTRACT
    done = peel(tmp_path / "cache", command, ckpt, "--data", tmp_path / "ids.npy", *settings)
    assert_refused(done, FAILED, *words)
    assert leftovers(tmp_path / "cache") == []


# -- weights and states that are not finite ----------------------------------------------------------------------------


def poison(ckpt: Path, name: str, value: float) -> None:
    for shard in ckpt.glob("model-*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name].view(-1)[3] = value
            save_file(tensors, shard, metadata={"format": "pt"})
            return
    raise KeyError(name)


WHERE = [
    ("model.layers.1.mlp.up_proj.weight", float("nan"), 2),
    ("model.embed_tokens.weight", float("inf"), None),
]


@pytest.mark.parametrize(("tensor", "value", "layer"), WHERE)
def test_weights_that_are_not_finite_are_broken_and_not_an_error(
    tensor: str, value: float, layer: int | None, ckpt: Path, tmp_path: Path
) -> None:
    poison(ckpt, tensor, value)
    home, data = tmp_path / "cache", ("--data", tmp_path / "ids.npy")
    done = peel(home, "audit", ckpt, *data, *AUDIT, "-f", "json")
    assert done.code == 1
    (run,) = done.runs
    (finding,) = [f for f in run["findings"] if f["kind"] == "non-finite"]
    assert (finding["layer"], finding["tensor"]) == (layer, tensor)
    assert (run["network"]["flags"], run["network"]["flagged"]) == (["broken"], True)
    verdicts = {entry["layer"]: entry["verdict"] for entry in run["layers"]}
    assert verdicts == {n: "broken" if n == layer else "undecided" for n in (1, 2, 3)}
    assert run["flagged_layers"] == ([layer] if layer else [])
    table = peel(home, "audit", ckpt, *data, *AUDIT)
    assert table.code == 1
    assert tensor in " ".join(table.out.split())
    assert_refused(peel(home, "extract", ckpt, *data, *EXTRACT), FAILED, tensor, "peel audit")
    assert leftovers(home) == []


def test_states_that_are_not_finite_though_the_weights_are(ckpt: Path, tmp_path: Path) -> None:
    poison(ckpt, "model.layers.2.mlp.down_proj.weight", 3e38)
    poison(ckpt, "model.layers.2.post_attention_layernorm.weight", 3e38)
    home, data = tmp_path / "cache", ("--data", tmp_path / "ids.npy")
    done = peel(home, "audit", ckpt, *data, *AUDIT, "-f", "json")
    assert done.code == 1
    assert [entry["verdict"] for entry in done.runs[0]["layers"]] == ["undecided", "undecided", "broken"]
    assert_refused(peel(home, "extract", ckpt, *data, *EXTRACT), FAILED, "layer 3", "--dtype float32")
    assert leftovers(home) == []


# -- text that cannot be used ------------------------------------------------------------------------------------------


DATA: dict[str, tuple[np.ndarray | str | None, tuple[str, ...]]] = {
    "beyond.npy": (np.full((40, 32), 97), ("97", "vocabulary", "made with another tokenizer")),
    "few.npy": (
        np.arange(300) % 97,
        ("24 different sequences of 32 tokens", "768 tokens", "about 300 tokens"),
    ),
    "none.npy": (np.zeros(0, dtype=np.int64), ("--data",)),
    "empty.txt": ("", ("--data",)),
    "absent.npy": (None, ("--data",)),
}


@pytest.mark.parametrize("name", DATA)
def test_text_that_cannot_be_used_is_refused(name: str, ckpt: Path, tmp_path: Path) -> None:
    content, words = DATA[name]
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    done = peel(tmp_path / "cache", "audit", ckpt, "--data", tmp_path / name, *AUDIT)
    assert_refused(done, FAILED, name, *words)
    assert leftovers(tmp_path / "cache") == []


def test_the_default_text_needs_a_tokenizer(ckpt: Path, tmp_path: Path) -> None:
    done = peel(tmp_path / "cache", "audit", ckpt, *AUDIT)
    assert_refused(done, FAILED, "no tokenizer", "tokenizer.json", "--data FILE.npy")
    assert leftovers(tmp_path / "cache") == []


# -- command line and configuration ------------------------------------------------------------------------------------


def test_every_mistake_of_a_config_file_is_told_at_once(ckpt: Path, tmp_path: Path) -> None:
    file = tmp_path / "nightly.yaml"
    file.write_text(
        "extract:\n  fit-tokens: many\n  sed: 1\nfit:\n  scheme: trenary\n  ladder: 3\nreports: {}\n"
    )
    done = peel(tmp_path / "cache", "audit", ckpt, "-c", file, *AUDIT)
    places = ("extract.fit-tokens", "extract.sed", "fit.scheme", "fit.ladder", "reports")
    assert_refused(done, USAGE, *(f"nightly.yaml: {place}" for place in places), "did you mean 'ternary'?")
    assert not (tmp_path / "cache").exists()


OUTSIDE = [
    ("9", "1-3"),
    ("0", "1-3"),
    ("2-9", "1-3"),
    ("3-1", "lower one first"),
    ("two", "a list of layers"),
]


@pytest.mark.parametrize(("layers", "word"), OUTSIDE)
def test_layers_that_the_checkpoint_does_not_have_are_refused(
    layers: str, word: str, ckpt: Path, tmp_path: Path
) -> None:
    data = ("--data", tmp_path / "ids.npy")
    for more in [(), ("--dry-run",)]:
        done = peel(tmp_path / "cache", "audit", ckpt, *data, *AUDIT, "--layers", layers, *more)
        assert_refused(done, USAGE, "--layers", layers, word)
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("inside", ["audit", "extract", "graft"])
def test_nothing_is_written_inside_the_checkpoint(
    inside: str, fitted: dict[str, Path], tmp_path: Path
) -> None:
    ckpt, data = fitted["ckpt"], ("--data", fitted["data"])
    before = sorted(path.name for path in ckpt.rglob("*"))
    commands: dict[str, tuple[Any, ...]] = {
        "audit": (ckpt, *data, *AUDIT, "-o", ckpt / "work"),
        "extract": (ckpt, *data, *EXTRACT, "-o", ckpt / "acts.h5"),
        "graft": (fitted["fit"], ckpt, "--layer", "1", "-o", ckpt / "better"),
    }
    done = peel(tmp_path / "cache", inside, *commands[inside])
    assert_refused(done, USAGE, "lies inside the checkpoint", "Name another", "--output")
    assert sorted(path.name for path in ckpt.rglob("*")) == before


def test_graft_does_not_write_over_a_directory(fitted: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("kept")
    done = peel(
        tmp_path / "cache", "graft", fitted["fit"], fitted["ckpt"], "--layer", "1", "-o", tmp_path / "there"
    )
    assert_refused(done, USAGE, "there: exists already", "name a new directory with --output")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("ask", "word"),
    [(("--layer", "9"), "layers [1, 2, 3]"), (("--layer", "2", "--reference", "best"), "identity-002")],
)
def test_graft_of_a_reference_that_is_not_there(
    ask: tuple[str, ...], word: str, fitted: dict[str, Path], tmp_path: Path
) -> None:
    done = peel(tmp_path / "cache", "graft", fitted["fit"], fitted["ckpt"], *ask, "-o", tmp_path / "new")
    assert_refused(done, USAGE, word, ask[-1])
    assert not (tmp_path / "new").exists()


# -- files of peel's own -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sound checkpoint with its activations and its fit."""
    home = tmp_path_factory.mktemp("fitted")
    acts = peel(home, "extract", sound / "ckpt", "--data", sound / "ids.npy", *EXTRACT)
    fit = peel(home, "fit", acts.out.strip(), *FIT)
    paths = {"ckpt": sound / "ckpt", "data": sound / "ids.npy"}
    return paths | {"acts": Path(acts.out.strip()), "fit": Path(fit.out.strip())}


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def newer(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = 99


def not_hdf5(path: Path) -> None:
    path.write_text("not HDF5")


def without_ids(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for name in ("ids", "trained"):
            file.pop(name, None)


def unreadable_about(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["about"]
        file["about"] = "{"


def directory_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (truncated, ("not a whole HDF5 file", "delete it and make it anew")),
    (newer, ("version 99 is newer than 2", "Upgrade")),
    (not_hdf5, ("not a whole HDF5 file", "make it anew")),
    (without_ids, ("damaged", "make it anew")),
    (unreadable_about, ("'about'", "make the file anew")),
    (Path.unlink, ("no such file", "peel extract", "peel fit")),
    (directory_instead, ("a directory", "Name the file in it")),
]


@pytest.mark.parametrize(("damage", "words"), FILES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("command", ["fit", "report", "verify"])
def test_a_damaged_file_is_refused(
    command: str,
    damage: Callable[[Path], None],
    words: tuple[str, ...],
    fitted: dict[str, Path],
    tmp_path: Path,
) -> None:
    copy = tmp_path / "copy.h5"
    shutil.copyfile(fitted["acts" if command == "fit" else "fit"], copy)
    damage(copy)
    more = [fitted["ckpt"]] if command == "verify" else list(FIT) if command == "fit" else []
    assert_refused(peel(tmp_path / "cache", command, copy, *more), FAILED, "copy.h5", *words)
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["fit.h5", "report.json"])
def test_an_audit_writes_no_single_file(name: str, fitted: dict[str, Path], tmp_path: Path) -> None:
    done = peel(tmp_path / "cache", "audit", fitted["ckpt"], "-o", tmp_path / name)
    assert_refused(done, USAGE, "is the directory", "send stdout there", "peel report")
    assert not (tmp_path / name).exists()


def test_a_fit_is_not_activations_and_the_other_way_round(fitted: dict[str, Path], tmp_path: Path) -> None:
    done = peel(tmp_path / "cache", "fit", fitted["fit"], *FIT)
    assert_refused(
        done, FAILED, "expected a file of schema peel/activations, found 'peel/fit'", "order of arguments"
    )
    done = peel(tmp_path / "cache", "report", fitted["acts"])
    assert_refused(done, FAILED, "expected a file of schema peel/fit, found 'peel/activations'")


def test_a_file_of_another_checkpoint_is_refused(fitted: dict[str, Path], tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    done = peel(tmp_path / "cache", "fit", fitted["acts"], "--checkpoint", other, *FIT)
    assert_refused(done, FAILED, "other", "its weights have changed", "Extract again")
    done = peel(tmp_path / "cache", "verify", fitted["fit"], other, "--layers", "1")
    assert_refused(done, FAILED, "other", "Name the checkpoint that was audited")
    done = peel(tmp_path / "cache", "graft", fitted["fit"], other, "--layer", "1", "-o", tmp_path / "new")
    assert_refused(done, FAILED, "other", "Name the checkpoint that was audited")
    assert not (tmp_path / "new").exists()
    assert leftovers(tmp_path / "cache") == []


def test_a_checkpoint_that_has_moved_can_be_named(fitted: dict[str, Path], tmp_path: Path) -> None:
    acts = tmp_path / "acts.h5"
    shutil.copyfile(fitted["acts"], acts)
    with h5py.File(acts, "r+") as file:
        about = json.loads(file["about"][()]) | {"checkpoint": "gone/ckpt"}
        del file["about"]
        file["about"] = json.dumps(about)
    assert_refused(peel(tmp_path / "cache", "fit", acts, *FIT), FAILED, "gone/ckpt", "--checkpoint")
    done = peel(tmp_path / "cache", "fit", acts, *FIT, "--checkpoint", fitted["ckpt"])
    assert (done.code, Path(done.out.strip()).is_file()) == (0, True)


@pytest.mark.parametrize("command", ["extract", "fit"])
def test_a_file_with_other_work_is_not_written_over(
    command: str, fitted: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "mine.h5"
    shutil.copyfile(fitted["acts" if command == "extract" else "fit"], output)
    before = output.read_bytes()
    what = (
        (fitted["ckpt"], "--data", fitted["data"], *EXTRACT)
        if command == "extract"
        else (fitted["acts"], *FIT)
    )
    done = peel(tmp_path / "cache", command, *what, "--seed", "5", "-o", output)
    assert_refused(done, FAILED, "mine.h5: exists and holds other work", "--overwrite")
    assert output.read_bytes() == before
    done = peel(tmp_path / "cache", command, *what, "--seed", "5", "-o", output, "--overwrite")
    assert (done.code, done.out.strip()) == (0, str(output))
    assert output.read_bytes() != before
