"""The table of formats, and the plain figures they share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hand_made import RESULT
from hypothesis import given
from hypothesis import strategies as st

from peelcli.config import FORMATS
from peelcli.errors import UsageError
from peelcli.records.printable import is_visible, printable
from peelcli.report import REPORTS, render
from peelcli.report.plain import base_name, fixed, gap_with_interval, layer_list, layers_named, short, signed


def test_every_format_is_called_alike_and_ends_with_a_newline():
    assert tuple(REPORTS) == FORMATS
    for name in REPORTS:
        text = render([RESULT], name, top=1, width=80, color=True)
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
    assert json.loads(render([RESULT], "json"))["flagged"] is True
    assert render([RESULT]) == render([RESULT], "table")


def test_an_unknown_format_is_named_with_those_there_are():
    with pytest.raises(UsageError, match=r"--format 'xml': expected one of table, json, csv"):
        render([RESULT], "xml")


def test_the_readme_tells_of_every_format():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for name in FORMATS:
        assert f"| `{name}` |" in readme


def test_rendering_needs_neither_torch_nor_h5py():
    code = "import sys, peelcli.report; print({'torch', 'h5py', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@given(st.text())
def test_printable_is_one_line_and_leaves_plain_text_alone(name):
    assert printable(name).isprintable()
    if all(map(is_visible, name)) and not any(command in name for command in ("::", "##")):
        assert printable(name) == name


@given(st.text("ab:#[ \n", max_size=40))
def test_no_name_becomes_a_command_of_the_runner_that_reads_the_output(name):
    assert not any(command in printable(name) for command in ("::", "##["))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (-0.00001, "0.0000"),
        (0.00001, "0.0000"),
        (0.01, "+0.0100"),
        (-2.5, "-2.5000"),
        (12345.6, "+1.235e+04"),
    ],
)
def test_signed(value, expected):
    assert signed(value) == expected


def test_figures():
    assert fixed(float("nan")) == "nan"
    assert fixed(float("-inf")) == "-inf"
    assert [short(bits) for bits in (None, 0.0, 1.58, 16.0, 0.527)] == ["-", "0", "1.58", "16", "0.527"]
    assert gap_with_interval(0.01, (0.006, 0.014)) == "+0.0100 ±0.0040"
    assert gap_with_interval(0.01, (0.0, 0.014)) == "+0.0100 [0.0000, +0.0140]"
    assert gap_with_interval(-0.1171, (-0.1441, -0.0943)) == "-0.1171 ±0.0270"
    assert gap_with_interval(0.01, (0.02, 0.03)) == "+0.0100 [+0.0200, +0.0300]"
    assert gap_with_interval(0.01, None) == "+0.0100"


@given(st.sets(st.integers(1, 60), min_size=1))
def test_layer_list_names_each_layer_and_no_other(layers):
    named = set()
    for part in layer_list(layers).split(", "):
        first, _, last = part.partition("-")
        named.update(range(int(first), int(last or first) + 1))
    assert named == layers


def test_names():
    assert layers_named([3]) == "layer 3"
    assert layers_named([6, 1, 5, 4, 4]) == "layers 1, 4-6"
    assert [base_name(path) for path in ("/runs/a/", "a", "org/model", "/", "")] == [
        "a",
        "a",
        "model",
        "/",
        "",
    ]
