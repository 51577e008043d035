"""CSV, Markdown, GitHub annotations, JUnit and SARIF: valid by their own rules, whatever a checkpoint is called."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import string
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hand_made import LAYERS, RESULT, healthy, hostile, regressed, varied
from hostile_names import EVERY_NAME, HOSTILE, SHORT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from junit_rules import parsed_junit
from markdown_it import MarkdownIt
from pydantic_sarif.model import StaticAnalysisResultsFormatSarifVersion210JsonSchema as SarifLog

from peelcli import __version__
from peelcli.errors import UsageError
from peelcli.records.printable import printable
from peelcli.report import REPORTS, render
from peelcli.report.markdown import LARGEST
from peelcli.report.plain import base_name

GOLDEN = Path(__file__).with_name("golden")
TEXTS = {"csv": "csv", "markdown": "md", "github": "txt", "junit": "xml", "sarif": "json"}
names = st.text(max_size=60)


def steady(text):
    """A report without what differs from one day, or one version of peel, to the next."""
    text = re.sub(r'timestamp="[^"]*"', 'timestamp="2026-01-01T00:00:00"', text)
    return text.replace(f'"version": "{__version__}"', '"version": "0"')


@pytest.mark.parametrize("format", TEXTS)
def test_golden(format):
    text = steady(render([RESULT, hostile(SHORT)], format))
    path = GOLDEN / f"report.{TEXTS[format]}"
    if os.environ.get("PEEL_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8", newline="")
    assert text == path.read_bytes().decode("utf-8"), (
        "if that is as meant: PEEL_WRITE_GOLDEN=1, and look at the diff"
    )


@pytest.mark.parametrize("format", TEXTS)
def test_top_leaves_layers_out_and_refuses_none(format):
    assert "ayer 4" in render([RESULT], format) or format == "csv"
    assert len(render([RESULT], format, top=1)) < len(render([RESULT], format))
    with pytest.raises(UsageError, match="--top 0"):
        render([RESULT], format, top=0)


@pytest.mark.parametrize("format", [format for format in REPORTS if format != "html"])
@given(name=names)
@settings(max_examples=15, deadline=None)
def test_nothing_that_steers_a_terminal_is_passed_on(format, name):
    text = render([hostile(name), RESULT], format)
    assert all(char.isprintable() or char == "\n" for char in text)
    text.encode("utf-8")


@pytest.mark.parametrize("format", REPORTS)
def test_a_flagged_layer_and_a_flagged_network_are_named(format):
    flagged = varied(network_flagged=True, network={"flags": ("untrained",), "notes": ()})
    text = render([flagged], format)
    assert "untrained" in text
    assert re.search(r"(?i)layer\W+3\b|^\W*3\W+surpassed|,3,true,surpassed", text, re.MULTILINE)


@pytest.mark.parametrize("format", [format for format in REPORTS if format != "html"])
def test_a_layer_that_regressed_is_named_with_what_became_of_it(format):
    text = " ".join(render([regressed()], format).split())
    assert "byte for byte what it was then" in text
    assert "it was audited then, and is not now" in text
    assert "night-1" in text or format in ("csv", "github", "junit", "sarif")
    bad = regressed(EVERY_NAME, EVERY_NAME)
    assert all(char.isprintable() or char == "\n" for char in render([bad], format))


def test_what_became_of_a_layer_is_why_it_fails():
    night = regressed()
    (suite,) = parsed_junit(render([night], "junit"))
    failures = {case.get("name"): case.find("failure") for case in suite.findall("testcase")}
    assert [name for name, found in failures.items() if found is not None] == ["layer 2", "layer 4"]
    assert failures["layer 2"].get("type") == "regressed"
    assert failures["layer 2"].get("message").startswith("layer 2 regressed: Regressed: byte for byte")
    assert failures["layer 4"].get("type") == "missing"
    titles = [title for level, title, _ in commands(night) if level == "error"]
    assert titles == ["peel%3A layer 4 missing", "peel%3A layer 2 regressed"]
    assert {entry["ruleId"] for entry in sarif(night)} == {"layer-regressed", "layer-missing"}
    assert [(row["layer"], row["change"], row["flagged"]) for row in rows(night)] == [
        ("1", "same", "false"),
        ("2", "regressed", "true"),
        ("3", "same", "false"),
        ("4", "missing", "true"),
    ]
    assert "| 2 | regressed | effective | effective | 0.0000 ±0.0000 | direct ternary g128 |" in render(
        [night], "markdown"
    )
    assert {tag for tag, _ in seen(render([regressed(EVERY_NAME, EVERY_NAME)], "markdown")).elements} <= OURS


# -- csv ---------------------------------------------------------------------------------------------------------------


def rows(*results, **options):
    return list(csv.DictReader(io.StringIO(render(results, "csv", **options), newline="")))


def test_csv_has_a_row_for_each_layer_with_its_figures():
    table = rows(RESULT, healthy(2))
    assert [row["layer"] for row in table] == ["1", "2", "3", "4", "5", "1", "2"]
    assert [row["flagged"] for row in table[:5]] == ["false", "true", "true", "false", "true"]
    third = table[2]
    figures = [float(third[key]) for key in ("gap", "gap_low", "gap_high", "drop_cost", "ce")]
    assert figures == [0.01, 0.006, 0.014, 0.21, 1.86]
    assert (third["reference"], third["fvu"], third["step"]) == ("identity-003-attention", "", "5000")


def test_csv_has_a_row_for_a_run_without_layers():
    (row,) = rows(varied(layers=(), flagged=(), network_flagged=True, network={"flags": ("broken",)}))
    assert (row["checkpoint"], row["layer"], row["network_flags"]) == (RESULT.run.checkpoint, "", "broken")


@given(names)
@settings(max_examples=40, deadline=None)
@example("=1")
@example("\t=1")
@example("  @x")
def test_no_text_of_a_csv_is_a_formula_and_it_can_be_read_back(name):
    (row,) = rows(hostile(name))
    for column, value in row.items():
        if column not in ("gap", "gap_low", "gap_high", "score", "drop_cost"):  # figures, some below zero
            assert not value.lstrip().startswith(("=", "+", "-", "@"))
    assert row["reason"].removeprefix("'") == printable(name).removeprefix("'")


def test_csv_figures_that_are_not_finite_are_empty():
    (row,) = rows(varied(layers=(replace(LAYERS[2], gap=float("nan"), fvu=float("inf")),)))
    assert (row["gap"], row["fvu"]) == ("", "")


# -- markdown ----------------------------------------------------------------------------------------------------------


class _Seen(HTMLParser):
    """The elements of a rendered page, and its pieces of text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def seen(markdown):
    """As GitHub would show it: its dialect, with HTML let through and links made of addresses."""
    parser, dialect = _Seen(), MarkdownIt("gfm-like")
    assert dialect.linkify is not None
    # GitHub makes no link of a bare example.org or //example.org…
    dialect.linkify.set({"fuzzy_link": False}).add("//", None)
    assert not re.search(r"(?i)www\.\w", markdown)  # …but of www.example.org
    parser.feed(dialect.render(markdown))
    return parser


@cache
def unmarked():
    """The page with a name in which nothing is special."""
    return seen(render([hostile("x"), RESULT], "markdown"))


OURS = {
    "h2",
    "h3",
    "h4",
    "p",
    "ul",
    "li",
    "strong",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "code",
    "sub",
    "span",
    "em",
}


@given(names)
@settings(max_examples=30, deadline=None)
def test_nothing_in_a_name_is_markdown(name):
    markdown = render([hostile(name), RESULT], "markdown")
    plain, page = unmarked(), seen(markdown)
    assert {tag for tag, _ in page.elements} <= OURS
    # as many of each as with a name that has nothing special, but for what parts a mention from its sign
    tags = [tag for tag, _ in page.elements if tag != "span"]
    assert tags == [tag for tag, _ in plain.elements]
    assert all(set(attributes) <= {"style"} for _, attributes in page.elements)
    assert not [text for text in page.texts if re.search(r"@\w", text)]
    assert " ".join(printable(name).split()) in " ".join("".join(page.texts).split())


for _name in HOSTILE:
    test_nothing_in_a_name_is_markdown = example(_name)(test_nothing_in_a_name_is_markdown)


def test_several_runs_begin_with_a_table_of_them():
    text = render([healthy(), RESULT], "markdown")
    assert text.startswith("## peel: 1 of 2 runs flagged\n\n| run | step | CE | zone | outcome |\n")
    assert text.index("### <code>ckpt-5000</code>") < text.index("| **3** |")


def test_a_summary_keeps_below_what_github_takes_and_says_so():
    words = {"reason": EVERY_NAME * 3, "advice": EVERY_NAME * 3}
    layers = tuple(replace(LAYERS[2], layer=n, **words, notes=(str(n),)) for n in range(1, 401))
    run = {"num_layers": 400, "layers": tuple(range(1, 401))}
    text = render([varied(layers=layers, run=run)] * 3, "markdown")
    assert 0.9 * LARGEST < len(text.encode()) <= 1024 * 1024
    assert re.search(r"\*\d+ more lines are left out: a summary holds 1 MiB at most\.\*\n$", text)


# -- github ------------------------------------------------------------------------------------------------------------

COMMAND = re.compile(r"::(error|warning|notice) title=([^:,]*)::(.*)")


def commands(*results, **options):
    found = [COMMAND.fullmatch(line) for line in render(results, "github", **options).splitlines()]
    assert all(found)
    return [match.groups() for match in found]


@given(names)
@settings(max_examples=40, deadline=None)
@example("\n::error::z")
@example("%0A::error::z")
@example("\x85::error::z")
def test_a_name_makes_no_command_of_its_own(name):
    found = commands(hostile(name))
    assert [level for level, _, _ in found] == ["error", "error", "warning", "notice"]

    def decoded(text):
        text = text.replace("%0D", "\r").replace("%0A", "\n").replace("%3A", ":").replace("%2C", ",")
        return text.replace("%25", "%")

    assert printable(name) in decoded(found[1][2])
    assert "%" not in re.sub("%(25|0A|0D|3A|2C)", "", "".join(map("".join, found)))


def test_annotations_name_layer_reason_and_advice_the_worst_first():
    found = commands(RESULT)
    assert [title for _, title, _ in found[:3]] == [
        f"peel%3A layer {w}" for w in ("5 broken", "3 surpassed", "2 matched")
    ]
    assert found[1][2] == f"ckpt-5000, layer 3: {LAYERS[2].reason} {LAYERS[2].advice}"
    assert found[3][0] == "notice"
    assert found[3][2].endswith("; undecided: layer 4")


def test_nothing_flagged_is_a_notice_alone():
    ((level, _, message),) = commands(healthy())
    assert level == "notice"
    assert "nothing is flagged" in message


def test_of_more_than_github_shows_the_last_counts_the_rest():
    layers = tuple(replace(LAYERS[2], layer=n) for n in range(1, 41))
    found = commands(varied(layers=layers, flagged=tuple(range(1, 41))))
    errors = [entry for entry in found if entry[0] == "error"]
    assert len(errors) == 10
    assert errors[-1][1] == "peel%3A 31 more"
    assert "layer 40" in errors[-1][2]
    assert len([e for e in commands(*[healthy(2)] * 15) if e[0] == "notice"]) == 10


# -- junit -------------------------------------------------------------------------------------------------------------


@given(names)
@settings(max_examples=40, deadline=None)
@example(EVERY_NAME)
@example("a  b ")
def test_junit_is_valid_whatever_the_names(name):
    (suite,) = parsed_junit(render([hostile(name)], "junit"))
    failures = suite.findall("testcase/failure")
    assert len(failures) == 2  # the network's and the layer's
    assert printable(name) in (failures[1].text or "")


def test_junit_fails_what_is_flagged_and_skips_what_is_undecided():
    (suite, sound) = parsed_junit(render([RESULT, healthy(2)], "junit"))
    outcome = {case.get("name"): [child.tag for child in case] for case in suite.findall("testcase")}
    assert outcome == {
        "network": [], "layer 1": [], "layer 2": ["failure"], "layer 3": ["failure"], "layer 4": ["skipped"],
        "layer 5": ["failure"],
    }  # fmt: skip
    assert suite.get("time") == "12.500"
    assert suite.find("testcase[@name='layer 2']").get("time") == "1.500"
    assert [sound.get(key) for key in ("tests", "failures", "skipped")] == ["3", "0", "0"]
    strict = varied(flagged=(4,))  # --fail-on undecided
    (suite,) = parsed_junit(render([strict], "junit"))
    assert [child.tag for child in suite.find("testcase[@name='layer 4']")] == ["failure"]


def test_junit_fails_the_network_by_itself():
    broken = varied(layers=(), flagged=(), network_flagged=True, network={"flags": ("broken",), "notes": ()})
    (suite,) = parsed_junit(render([broken], "junit"))
    (case,) = suite.findall("testcase")
    assert case.find("failure").get("type") == "broken"
    assert "not finite" in case.find("failure").text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('tests="6"', 'tests="7"'),
        (' package="peel"', ""),
        ("<system-err>", "<x />\n<system-err>"),
        ('time="12.500"', 'time="-"'),
    ],
)
def test_the_rules_of_junit_can_fail(old, new):
    text = render([RESULT], "junit")
    assert old in text
    with pytest.raises(AssertionError):
        parsed_junit(text.replace(old, new))


# -- sarif -------------------------------------------------------------------------------------------------------------


def sarif(*results, **options):
    text = render(results, "sarif", **options)
    SarifLog.model_validate_json(text, strict=False)
    (run,) = json.loads(text)["runs"]
    rules = run["tool"]["driver"]["rules"]
    for entry in run["results"]:
        assert entry.get("ruleIndex") is None or rules[entry["ruleIndex"]]["id"] == entry["ruleId"]
        assert (entry["level"] == "none") == (entry["kind"] != "fail")
    return run["results"]


@given(names)
@settings(max_examples=25, deadline=None)
@example(EVERY_NAME)
def test_sarif_is_valid_whatever_the_names(name):
    network, layer = sarif(hostile(name))
    uri = layer["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert set(uri) <= set(string.ascii_letters + string.digits + "-._~/%:")
    assert ":" not in uri or uri.startswith("file:///")
    assert "](" not in layer["message"]["text"]
    assert network["ruleId"] == f"network-{printable(name)}"


def test_sarif_has_what_is_flagged_as_errors_and_the_undecided_as_open():
    found = {entry["ruleId"]: entry for entry in sarif(RESULT, healthy())}
    assert set(found) == {"layer-matched", "layer-surpassed", "layer-undecided", "layer-broken"}
    assert [found[f"layer-{verdict}"]["level"] for verdict in ("surpassed", "undecided")] == ["error", "none"]
    assert found["layer-undecided"]["kind"] == "open"
    third = found["layer-surpassed"]
    assert third["properties"]["gap"] == 0.01
    assert third["partialFingerprints"] == {"peelLayer/v1": "layer 3 layer-surpassed"}
    (place,) = third["locations"]
    assert place["logicalLocations"][0]["fullyQualifiedName"] == f"{base_name(RESULT.run.checkpoint)}/layer 3"
    unflagged = sarif(varied(flagged=()))
    assert {entry["kind"] for entry in unflagged} == {"informational", "open"}


def test_sarif_takes_figures_that_are_not_finite():
    (entry,) = sarif(varied(layers=(replace(LAYERS[2], gap=float("nan"), score=float("inf")),)))
    assert (entry["properties"]["gap"], entry["properties"]["score"]) == (None, None)
