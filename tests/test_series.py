"""Which checkpoints a command line names, and in which order; and which runs may be compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePath

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from peelcli.errors import CheckpointError, UsageError
from peelcli.records import Run
from peelcli.tracking.same_tokens import require_comparable, require_same_tokens, tokens_of
from peelcli.tracking.series import natural_key, series_of

RUN = Run(
    checkpoint="run/checkpoint-100",
    checkpoint_id="sha256:1",
    num_layers=3,
    layers=(1, 2, 3),
    seed=0,
    tokens={"fit": 512, "select": 256, "eval": 512},
    seq_len=32,
    data="stories.txt",
    vocab_size=97,
    data_hash="a",
)


def checkpoint(directory: Path, step: object = None) -> Path:
    """The least that is complete: a config and one tensor; `step` as the Trainer records it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, directory / "model.safetensors")
    if step is not None:
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return directory


def run_of(directory: Path, names: Iterable[str]) -> Path:
    for name in names:
        checkpoint(directory / name)
    return directory


def names_of(*arguments: Path) -> list[str]:
    return [member.path.name for member in series_of(arguments).members]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("run")
    return run_of(base, ["checkpoint-1000", "checkpoint-90", "step_200", "global_step400", "checkpoint-3"])


BY_STEP = ["checkpoint-3", "checkpoint-90", "step_200", "global_step400", "checkpoint-1000"]


@settings(deadline=None)
@given(names=st.permutations(BY_STEP), kept=st.integers(2, len(BY_STEP)))
def test_whatever_the_order_given_it_is_that_of_the_steps(run: Path, names: list[str], kept: int) -> None:
    series = series_of([run / name for name in names[:kept]])
    assert [m.path.name for m in series.members] == [n for n in BY_STEP if n in names[:kept]]
    assert [m.step for m in series.members] == sorted(m.step or -1 for m in series.members)
    assert (series.notes, series.warnings, series.is_run) == ((), (), False)


def test_a_run_is_its_checkpoints(run: Path, tmp_path: Path) -> None:
    series = series_of([run])
    assert [member.path for member in series.members] == [run / name for name in BY_STEP]
    assert (series.notes, series.warnings, series.is_run) == ((), (), True)
    other = run_of(tmp_path / "other", ["checkpoint-150"])
    assert names_of(other, run) == [*BY_STEP[:2], "checkpoint-150", *BY_STEP[2:]]
    for name in ("logs", ".cache", "deeper/checkpoint-7"):
        (other / name).mkdir(parents=True)
    checkpoint(other / ".hidden")
    assert names_of(other) == ["checkpoint-150"]
    assert series_of([other]).is_run  # it may hold more the next time
    assert not series_of([other / "checkpoint-150"]).is_run


def test_what_the_trainer_recorded_outweighs_the_name(tmp_path: Path) -> None:
    checkpoint(tmp_path / "best", step=50)
    run_of(tmp_path, ["checkpoint-40", "checkpoint-60"])
    assert names_of(tmp_path) == ["checkpoint-40", "best", "checkpoint-60"]


def test_without_a_step_the_order_is_as_given_and_said(tmp_path: Path) -> None:
    run_of(tmp_path, ["epoch 10", "epoch 9", "checkpoint-7", "Epoch 11"])
    series = series_of([tmp_path])
    assert [m.path.name for m in series.members] == ["checkpoint-7", "epoch 9", "epoch 10", "Epoch 11"]
    (note,) = series.notes
    assert "no training step is known of epoch 9, epoch 10, Epoch 11 (" in note
    given_order = [tmp_path / name for name in ("epoch 10", "checkpoint-7", "epoch 9")]
    assert names_of(*given_order) == ["epoch 10", "checkpoint-7", "epoch 9"]
    assert series_of(given_order[:1]).notes == ()  # one alone has no order


@given(st.lists(st.integers(0, 10**9), unique=True), st.sampled_from(["epoch-", "a", ""]))
def test_names_sort_by_their_numbers(numbers: list[int], word: str) -> None:
    names = sorted((f"{word}{number}" for number in numbers), key=natural_key)
    assert names == [f"{word}{number}" for number in sorted(numbers)]


@given(st.lists(st.text()))
def test_every_name_can_be_sorted_in_one_way(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


def test_the_same_step_twice_keeps_the_order_given(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path / "b" / "checkpoint-5"), checkpoint(tmp_path / "a" / "checkpoint-5")
    earlier = checkpoint(tmp_path / "checkpoint-4")
    for one, other in [(first, second), (second, first)]:
        assert [m.path for m in series_of([one, other, earlier]).members] == [earlier, one, other]


def test_one_directory_under_several_names_is_audited_once(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ["checkpoint-1", "checkpoint-2"])
    (run / "latest").symlink_to("checkpoint-2")
    series = series_of([run, run / "checkpoint-1"])
    assert [member.path.name for member in series.members] == ["checkpoint-1", "checkpoint-2"]
    twice, link = sorted(series.notes, key=lambda note: "latest" in note)
    assert twice == f"{run / 'checkpoint-1'}: named twice; it is audited once"
    assert f"{run / 'latest'}: the same directory as {run / 'checkpoint-2'}" in link


# -- what is not whole -------------------------------------------------------------------------------------------------


def cut_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def cut_state(directory: Path) -> None:
    (directory / "trainer_state.json").write_text('{"global_st')


@pytest.mark.parametrize("damage", [cut_weights, remove_weights, remove_config, cut_state])
def test_a_listed_checkpoint_that_is_not_whole_is_left_out_with_a_warning(damage, tmp_path: Path) -> None:
    run_of(tmp_path, ["checkpoint-1", "checkpoint-2", "checkpoint-3"])
    damage(tmp_path / "checkpoint-2")
    series = series_of([tmp_path])
    assert [member.path.name for member in series.members] == ["checkpoint-1", "checkpoint-3"]
    (warning,) = series.warnings
    assert str(tmp_path / "checkpoint-2") in warning


@pytest.mark.parametrize("damage", [cut_weights, remove_weights, cut_state])
def test_one_that_is_named_is_not_left_out(damage, tmp_path: Path) -> None:
    run_of(tmp_path, ["checkpoint-1", "checkpoint-2"])
    damage(tmp_path / "checkpoint-2")
    arguments = [tmp_path, tmp_path / "checkpoint-2"]
    assert names_of(*arguments) == ["checkpoint-1", "checkpoint-2"]
    warnings = series_of(arguments).warnings
    assert len(warnings) == (damage is cut_state)  # its step is not known, and why
    assert all("trainer_state.json" in warning for warning in warnings)


def test_where_there_is_no_checkpoint_it_is_said_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    expected = r"run: has no config\.json, expected config\.json beside .* Nor has any directory right below"
    with pytest.raises(CheckpointError, match=expected):
        series_of([tmp_path / "run"])
    with pytest.raises(CheckpointError, match="no such directory"):
        series_of([tmp_path / "absent"])
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        series_of([tmp_path / "file"])
    cut_weights(checkpoint(tmp_path / "run" / "checkpoint-1"))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints in it is whole; the first: .*-1"):
        series_of([tmp_path / "run"])


def test_a_final_model_beside_the_run_s_checkpoints_does_not_hide_them(tmp_path: Path) -> None:
    final = checkpoint(tmp_path / "run")
    run_of(final, ["checkpoint-10", "checkpoint-9", "onnx"])
    series = series_of([final])
    assert [member.path for member in series.members] == [final]
    (note,) = series.notes
    assert note.endswith("not audited unless named too: checkpoint-9, checkpoint-10")
    (note,) = series_of([final, final / "checkpoint-9", final / "checkpoint-10"]).notes
    assert "no training step" in note
    shutil.rmtree(final / "checkpoint-9")
    shutil.rmtree(final / "checkpoint-10")
    assert series_of([final]).notes == ()


# -- the same tokens ---------------------------------------------------------------------------------------------------

DIFFERENCES = {
    "data": ("shakespeare.txt", "the text (stories.txt and shakespeare.txt)"),
    "tokens": ({"fit": 1, "select": 2, "eval": 3}, "512 fit + 256 select + 512 eval and 1 fit + 2 select"),
    "seq_len": (16, "the sequence length (32 and 16)"),
    "seed": (1, "the seed (0 and 1)"),
    "vocab_size": (98, "the vocabulary size (97 and 98)"),
    "data_hash": ("b", "the tokenizer"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_it_is_said_what_differs_and_in_which_checkpoints(name: str) -> None:
    value, words = DIFFERENCES[name]
    other = replace(RUN, checkpoint="run/checkpoint-200", **{"data_hash": "b", name: value})
    with pytest.raises(UsageError) as refused:
        require_same_tokens(tokens_of(RUN), tokens_of(other))
    for word in (RUN.checkpoint, other.checkpoint, words, "--data FILE.npy"):
        assert word in str(refused.value)
    assert ("the tokenizer," in str(refused.value)) == (name == "data_hash")
    # The same ids are the same whatever they came from, and what was not measured goes with anything.
    for data_hash in (RUN.data_hash, ""):
        same = replace(other, data_hash=data_hash)
        require_same_tokens(tokens_of(RUN), tokens_of(same))
        require_same_tokens(tokens_of(same), tokens_of(RUN))


@given(st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=6))
def test_fits_are_compared_where_their_tokens_are_the_same_and_else_grouped(hashes: list[str]) -> None:
    runs = [(PurePath(f"{n}.h5"), replace(RUN, data_hash=data_hash)) for n, data_hash in enumerate(hashes)]
    groups = dict.fromkeys(data_hash for data_hash in hashes if data_hash)
    if len(groups) < 2:
        require_comparable(runs)
        return
    with pytest.raises(UsageError) as refused:
        require_comparable(runs)
    lines = [line for line in str(refused.value).splitlines() if line.startswith("group")]
    assert len(lines) == len(groups)
    for data_hash, line in zip(groups, lines, strict=True):
        together = {f"{n}.h5" for n, its in enumerate(hashes) if its == data_hash}
        assert {word for word in line.split() if word.endswith(".h5")} == together
