"""A series at a glance: right at every width, in any encoding, and the worst of what shares a sign."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hand_made import RESULT, healthy, varied
from hypothesis import given, settings
from hypothesis import strategies as st
from long_series import series
from rich.cells import cell_len

from peelcli.report.sparkline import LEVELS, PLAIN_LEVELS, trend
from peelcli.report.table import MOST_RUNS, render_table

PLAIN = [
    "   CE  Ryyggggg  #:--__._    1.678  green",
    "    1  ........  #*+=:-._  -0.2465  effective",
    "    2  ........  #*+=:-._  -0.1732  effective",
    "    3  ....SSSS  :-._#*##  +0.0301  surpassed",
]


def strip_of(text):
    """The lines under the strip's header, up to the next blank one."""
    lines = text.splitlines()
    start = next(
        number for number, line in enumerate(lines) if re.match(r"layer +strip +trend +last *$", line)
    )
    return lines[start + 2 : lines.index("", start)]


def test_a_row_for_the_network_and_for_each_layer():
    rows = strip_of(render_table(series(6, 8)))
    assert len(rows) == 7
    assert [row.split()[:2] for row in rows] == [line.split()[:2] for line in PLAIN] + [
        [str(n), "........"] for n in (4, 5, 6)
    ]
    assert rows[3].split()[-2:] == ["+0.0301", "surpassed"]


def test_blocks_where_the_encoding_has_them_and_ascii_elsewhere():
    plain, blocks = (strip_of(render_table(series(6, 8), unicode=unicode)) for unicode in (False, True))
    assert all(line.isascii() for line in plain)
    as_blocks = str.maketrans(PLAIN_LEVELS, LEVELS)
    for one, other in zip(plain, blocks, strict=True):
        trend, drawn = one.split()[2], other.split()[2]
        assert drawn == trend.translate(as_blocks)
        assert one.replace(trend, "") == other.replace(drawn, "")


def test_two_runs_need_no_strip():
    assert "trend" not in render_table([RESULT, healthy()])
    assert "trend" in render_table([RESULT, healthy(), RESULT])


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("unicode", [False, True])
@pytest.mark.parametrize("color", [False, True])
def test_any_number_of_runs_fits_any_width(width, unicode, color):
    for count in (3, 20, 150):
        text = render_table(series(3, count), width=width, unicode=unicode, color=color)
        bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert all(cell_len(line) <= width for line in bare.splitlines())
        assert "…" not in bare
        assert len(strip_of(bare)) == 4


def test_what_shares_a_sign_is_shown_by_its_worst():
    flagged_once = [healthy(3)] * 100
    flagged_once[41] = varied(layers=RESULT.layers[:3], flagged=(3,), run={"num_layers": 3})
    third = strip_of(render_table(flagged_once))[3].split()[1]
    assert third.count("S") == 1
    assert set(third) == {"S", "."}
    second = strip_of(render_table(flagged_once))[2].split()[1]
    assert second.count("m") == 1  # matched, and not flagged
    assert "One sign is the worst of up to 5 checkpoints." in " ".join(render_table(flagged_once).split())


def test_a_layer_that_was_not_audited_has_a_dash():
    rows = strip_of(render_table([healthy(2), healthy(3), healthy(2)]))
    assert rows[3].split()[:2] == ["3", "-.-"]


def test_of_a_long_series_the_newest_are_shown_in_full():
    text = render_table(series(3, 40))
    assert len(re.findall(r"^#\d+ +checkpoint-\d+, id", text, re.MULTILINE)) == 40
    assert len(re.findall(r"^#\d+ checkpoint-\d+: ", text, re.MULTILINE)) == MOST_RUNS
    headers = [
        word
        for line in text.splitlines()
        if line.startswith("layer  #")
        for word in re.findall(r"#\d+", line)
    ]
    assert headers == [f"#{n}" for n in range(29, 41)]
    assert "Of the runs #1 to #28 only" in text


@settings(deadline=None)
@given(st.lists(st.none() | st.floats(allow_nan=True), max_size=30), st.floats(0, 1))
def test_a_sparkline_keeps_the_order_of_its_values(values, span):
    line = trend(values, LEVELS, span)
    known = [(v, LEVELS.index(sign)) for v, sign in zip(values, line, strict=bool(line)) if sign != "·"]
    for (a, low), (b, high) in zip(sorted(known), sorted(known)[1:], strict=False):
        assert a <= b
        assert low <= high


def test_noise_does_not_fill_a_sparkline():
    assert trend([0.1, 0.1001, 0.1], LEVELS, 1.0) in ("▄▄▄", "▅▅▅", "▄▅▄", "▅▄▅")
    assert trend([0.0, 1.0], LEVELS, 0.0) == "▁█"
    assert trend([2.0, 2.0, None], LEVELS, 0.0) == "▅▅·"


def test_colour_marks_what_is_flagged():
    text = render_table(series(6, 8), color=True)
    assert "\x1b[7;31mS" in text
    assert "\x1b[7;31mS" not in render_table([replace(r, flagged=()) for r in series(6, 8)], color=True)
