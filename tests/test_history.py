"""A history is added to, whole lines at a time, whoever writes; what is damaged is told and costs no other line."""

from __future__ import annotations

import json
import multiprocessing
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from peelcli.errors import ArtefactError, ResourceError
from peelcli.records import HistoryEntry, HistoryLayer, HistoryNetwork
from peelcli.report import render
from peelcli.report.json_format import report_schema
from peelcli.report.sparkline import LEVELS, sparkline
from peelcli.tracking.history import append_history, read_history

LAYERS = tuple(
    HistoryLayer(n, "effective", score=0.1 * n, gap=-0.2, gap_interval=(-0.3, -0.1)) for n in (1, 2, 3)
)
ENTRY = HistoryEntry(
    time="2026-11-01T02:00:00+00:00", checkpoint="run/checkpoint-100", checkpoint_id="a", num_layers=3, step=100,
    flagged=False, network=HistoryNetwork(1.8, 6.05, "green"), layers=LAYERS, data_hash="d", peel_version="0.1.0",
)  # fmt: skip


def entry(number: int, **fields: object) -> HistoryEntry:
    return replace(ENTRY, checkpoint_id=f"id-{number}", step=number, **fields)  # type: ignore[arg-type]


def write_many(path: Path, writer: int, count: int) -> None:
    for number in range(count):
        append_history(path, [entry(1000 * writer + number)])


def test_two_writers_leave_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(path, n, 40)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = read_history(path)
    assert found.warnings == ()
    assert {e.step for e in found.entries} == {1000 * n + i for n in range(3) for i in range(40)}
    assert len(found.entries) == 120
    for n in range(3):  # each writer's own stay in order
        mine = [e.step or 0 for e in found.entries if (e.step or 0) // 1000 == n]
        assert mine == sorted(mine)


def test_the_same_audit_is_there_once(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    assert append_history(path, [entry(1), entry(2)]) == 2
    before = path.read_bytes()
    assert append_history(path, [entry(2, time="later", peel_version="9")]) == 0
    assert path.read_bytes() == before
    assert append_history(path, [entry(2, flagged=True, flagged_layers=(3,))]) == 1
    assert path.read_bytes().startswith(before)  # nothing is ever rewritten
    assert read_history(path).entries == (entry(1), entry(2), entry(2, flagged=True, flagged_layers=(3,)))


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 400))
def test_what_a_crash_left_of_a_line_costs_no_other(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("h") / "h.jsonl"
    append_history(path, [entry(1), entry(2)])
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    path.write_bytes(whole[: -min(cut, last - 1)])
    is_damaged = cut > 1  # without its line feed alone it is as good as whole
    found = read_history(path)
    assert found.entries == (entry(1),) + (() if is_damaged else (entry(2),))
    assert len(found.warnings) == is_damaged
    assert all("line 2 is damaged (a write was cut off)" in warning for warning in found.warnings)
    append_history(path, [entry(3)])
    found = read_history(path)
    assert found.entries[-1] == entry(3)
    assert found.entries[0] == entry(1)
    assert len(found.warnings) == is_damaged


@settings(deadline=None)
@given(
    lines=st.lists(
        st.binary(max_size=40) | st.sampled_from([b"null", b'{"schema":"peel/history"}', b"[" * 9999])
    )
)
def test_whatever_the_file_holds_it_is_told_line_by_line(
    lines: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("h") / "h.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = read_history(path)
    assert found.entries == ()
    assert len(found.warnings) == sum(bool(line.strip()) for line in b"\n".join(lines).split(b"\n"))


def full_disk(path: Path, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(ResourceError, match="--history"):
        append_history(path, [entry(3)])


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    append_history(path, [entry(1), entry(2)])
    before = path.read_bytes()
    child = multiprocessing.get_context("fork").Process(target=full_disk, args=(path, len(before) + 100))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert path.read_bytes() == before


def test_a_file_that_is_not_there_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="peel audit --history FILE"):
        read_history(tmp_path / "absent.jsonl")
    with pytest.raises(ResourceError, match="No such file"):
        append_history(tmp_path / "absent" / "h.jsonl", [entry(1)])


# -- drawn -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.none() | st.floats(-3, 3), min_size=1), st.floats(-2, -0.1), st.floats(0.1, 2))
def test_a_bar_is_higher_where_the_value_is(values: list[float | None], low: float, high: float) -> None:
    bars = sparkline(values, LEVELS, low, high)
    assert len(bars) == len(values)
    assert [bar == "·" for bar in bars] == [value is None for value in values]
    known = sorted((v, b) for v, b in zip(values, bars, strict=True) if v is not None)
    assert [bar for _, bar in known] == sorted(bar for _, bar in known)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("count", [1, 5, 300])
def test_a_history_fits_the_page_and_names_what_was_flagged(width: int, count: int) -> None:
    entries = [entry(n) for n in range(count)]
    broken = replace(LAYERS[1], verdict="broken", flagged=True, score=1024.0, gap=None, gap_interval=None)
    entries.append(entry(count, flagged=True, flagged_layers=(2,), layers=(LAYERS[0], broken)))
    text = render([], history=entries, width=width, unicode=True)
    assert all(len(line) <= width for line in text.splitlines())
    assert f"checkpoint-100 (step {count}), layer 2 flagged" in " ".join(text.split())
    rows = {line.replace("!", " ").split()[0]: line for line in text.splitlines() if line.strip()}
    assert rows["2"].lstrip().startswith("! 2")
    assert "x broken" in " ".join(rows["2"].split())
    assert rows["3"].split()[-1] == "-"  # was not audited last


def test_names_from_a_history_are_escaped() -> None:
    text = render([], history=[entry(1, checkpoint="x/\x1b[31m\n[red]evil\u202e")])
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_the_json_holds_the_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    append_history(path, [entry(1), entry(2, flagged=True, flagged_layers=(1,))])
    report = json.loads(render([], "json", history=read_history(path).entries))
    Draft202012Validator(report_schema()).validate(report)
    assert (report["runs"], report["flagged"]) == ([], True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [{k: v for k, v in line.items() if not k.startswith("schema")} for line in lines] == report[
        "history"
    ]
    schema = report_schema()["$defs"]
    assert set(report["history"][0]) == set(schema["history_entry"]["properties"])
    assert set(report["history"][0]["layers"][0]) == set(schema["history_layer"]["properties"])
