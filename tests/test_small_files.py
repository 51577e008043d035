"""Text files that peel is given are regular, small, and as flat as what it writes: else a message, and at once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import flagged_run, save_fit

from peelcli.checkpoint.training_step import training_step
from peelcli.cli.main import run as command
from peelcli.errors import CheckpointError
from peelcli.runtime.small_files import NOT_FINITE, parse_json, read_bounded
from peelcli.tracking.baseline import write_baseline
from peelcli.tracking.history import append_history, entry_of
from peelcli.verdict import judge

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from fuzzing.text import mutate_json, mutate_lines, mutate_yaml

USAGE, FAILED = 2, 3
OPTIONS = {
    "-c": (USAGE, "-c/--config"),
    "--baseline": (FAILED, "--write-baseline"),
    "--history": (FAILED, "history"),
}


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fit(tmp_path_factory.mktemp("fit") / "fit.h5")


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "huge"])
@pytest.mark.parametrize("option", OPTIONS)
def test_only_regular_files_of_bounded_size_are_read(
    option: str, kind: str, fit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        path = Path("/dev/zero")
    code, told = command(["report", str(fit), option, str(path)]), capsys.readouterr()
    expected, words = OPTIONS[option]
    assert (code, told.out) == (expected, "")
    assert str(path) in told.err
    assert words in told.err
    assert "internal error" not in told.err


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        '{"a":' * 10**5,
        "[" * 99 + "]" * 99,
        "9" * 5000,
        "NaN",
        '"\\ud800"',
        b"\xff",
        b'"\xed\xa0\x80"',
    ],
)
def test_json_that_no_one_means_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="."):
        parse_json(text)


def test_json_that_is_meant_is_read(tmp_path: Path) -> None:
    value: dict[str, Any] = {"a": [1, 2.5, None, "é😀", {"b": [[]]}]}
    assert (
        parse_json(json.dumps(value)) == parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
    )
    assert parse_json('[Infinity, "\\ud83d\\ude00"]', constants=NOT_FINITE) == [float("inf"), "😀"]
    (tmp_path / "four").write_bytes(b"1234")
    assert read_bounded(tmp_path / "four", 4) == b"1234"
    with pytest.raises(OSError, match="larger than"):
        read_bounded(tmp_path / "four", 3)


@pytest.mark.parametrize(
    "text", ["[" * 10**5, "{", "[]", '"x"', "\xff", '{"global_step": ' + "9" * 5000 + "}"]
)
def test_a_trainer_state_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: not the JSON object.*mend or remove"):
        training_step(tmp_path)


@pytest.mark.parametrize("step", ["true", "-1", "1e3", '"7"', "null", "9" * 300])
def test_a_step_that_is_none_is_not_taken(step: str, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-12"
    directory.mkdir()
    (directory / "trainer_state.json").write_text(f'{{"global_step": {step}, "x": NaN}}', encoding="utf-8")
    assert training_step(directory) == 12


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_no_mutation_of_a_text_file_is_a_mistake_of_peels(
    seed: int, fit: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng, home = random.Random(seed), tmp_path_factory.getbasetemp()
    baseline, history = home / "base.json", home / "history.jsonl"
    if not baseline.exists():
        result = judge(flagged_run())
        write_baseline(baseline, result)
        append_history(history, [entry_of(result), entry_of(judge(flagged_run(step=7)))])
    config = (
        "fit:\n  seed: 3\n  learning_rate: 0.01\nreport:\n  confidence: 0.9\n  fail_on: [broken, surpassed]\n"
    )
    option, data = rng.choice(
        (
            ("--baseline", mutate_json(baseline.read_text(encoding="utf-8"), rng)),
            ("--history", mutate_lines(history.read_text(encoding="utf-8"), rng)),
            ("-c", mutate_yaml(config, rng)),
        )
    )
    path = home / "mutated"
    path.write_bytes(data)
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = command(["report", str(fit), option, str(path), "-o", str(home / "out.txt")])
    assert code in (0, 1, USAGE, FAILED)
    assert "internal error" not in told.getvalue(), told.getvalue()
