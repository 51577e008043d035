"""The table: what it shows at each width, what it claims, and that nothing in a checkpoint can forge it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hand_made import LAYERS, RESULT, healthy, hostile, varied
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from peelcli.errors import UsageError
from peelcli.records import VERDICTS, Reference
from peelcli.report import wording
from peelcli.report.cells import STYLES
from peelcli.report.table import NARROWEST, render_table

HOSTILE = "[red]x[/red]\x1b[31m\r\nlayer 1: effective\x07\x9b2J\u2028\u202egpj.\x00[link=file:///]"
SERIES = [
    healthy(),
    varied(run={"step": 6000, "checkpoint": "ckpt-6000", "checkpoint_id": "aaaa"}, network={"ce": 1.81}),
    varied(
        run={"step": 7000, "checkpoint": "ckpt-7000", "checkpoint_id": "bbbb"},
        layers=LAYERS[:3],
        flagged=(3,),
    ),
]


UNTRAINED = {"flags": ("untrained",), "notes": ()}


def unwrapped(*results, **options):
    """The report with line breaks and runs of spaces made single spaces, to look for sentences in."""
    return " ".join(render_table(results, **options).split())


def table_rows(text, header=r"layer +verdict"):
    """The lines of the table whose header begins so: from under its rule to the next blank line."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if re.match(header, line)) + 1
    assert line_is_rule(lines[start])
    return lines[start + 1 : lines.index("", start)]


def line_is_rule(line):
    return set(line) == {"-"}


def test_one_row_a_layer_at_80_columns():
    text = render_table([RESULT], width=80)
    header = next(line for line in text.splitlines() if line.startswith("layer"))
    assert header == "layer verdict   gap             decided by          bits   fvu    drop blame"
    assert table_rows(text) == [
        "    1 effective -0.2040 ±0.0160 direct attn ternary    4 0.310 +2.2800 -",
        "  ! 2 matched   -0.0002 ±0.0007 direct ternary g128 1.58 0.042 +0.0104 block",
        "  ! 3 surpassed +0.0100 ±0.0040 identity attn          0     - +0.2100 attn",
        "    4 undecided -0.0021 ±0.0060 span 4-5 int4          - 0.400 +0.0600 -",
        "  ! 5 broken    -               -                      -     -       - -",
    ]


def test_wider_pages_show_more():
    text = render_table([RESULT], width=120)
    row = next(line for line in table_rows(text) if "surpassed" in line)
    decided = "identity attention 0 16 - +0.2100 attention +0.0100"
    assert " ".join(row.split()) == f"! 3 surpassed +0.0100 [+0.0060, +0.0140] {decided}"
    assert "own: bits per weight of the layer itself" in text


def test_everything_around_the_table_is_there():
    text = unwrapped(RESULT)
    for expected in (
        "ckpt-5000: 3 of 5 audited layers flagged (layers 2, 3, 5)",
        "ckpt-5000, id 3f9ac1d2b4e0, step 5000",
        "llama, 5 layers (all audited), float32 on cpu",
        "CPython's documentation; tokens: 16384 fit, 8192 select, 16384 eval; sequences of 128",
        "CE 1.860 nats/token, perplexity 6.42; token frequencies alone: CE 5.210",
        "suits the model (CE 1.860, entropy of the model's own predictions 1.790 nats/token)",
        "References ternary; seed 0",
        "layer 3: surpassed dropping its attention lowers the loss by 0.0100 Check the rotary permutation",
        "layer 5: broken 12 weights are not finite Restore the checkpoint. the scan names the tensors",
        "Network layers 1 and 5 share no weights",
        "Scan of the files non-finite in layer 5, model.layers.4.mlp.up_proj.weight: 12 of 4096 values",
        "Not audited span from layer 5: nothing lies above it",
    ):
        assert expected in text
    assert "layer 1: effective" not in text  # it needs no next step
    assert "/runs/a" not in text


def test_next_steps_put_the_worst_first_and_say_the_same_once():
    undecided = replace(LAYERS[3], gap=-0.003)
    text = unwrapped(varied(layers=(replace(undecided, layer=1), *LAYERS[2:4])))
    assert text.index("layer 3: surpassed") < text.index("layers 1, 4: undecided")
    assert text.count("Audit again with --tokens 65536.") == 1


def test_surpassed_is_proof_and_matched_is_not():
    surpassed, matched = wording.MEANINGS["surpassed"], wording.MEANINGS["matched"]
    assert "proof" in surpassed
    assert "improved" in surpassed
    assert "may be harmless" in matched
    assert "does not show that the loss could be lower" in matched
    assert "proof" not in matched
    only_matched = unwrapped(varied(layers=LAYERS[:2], flagged=(2,)))
    assert matched in only_matched
    assert surpassed not in only_matched


def test_every_verdict_has_its_word_and_colour():
    assert tuple(wording.MEANINGS) == VERDICTS
    assert set(STYLES) == set(VERDICTS)


def test_the_green_outcome_claims_nothing_beyond_the_suite():
    text = unwrapped(healthy())
    assert (
        "nothing is flagged: no reference in the suite does better; this proves nothing beyond the suite"
        in text
    )
    assert "What to do next" not in text


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (varied(layers=LAYERS[:3], flagged=()), "though layer 3 is surpassed and layer 2 is matched"),
        (varied(layers=(LAYERS[0], LAYERS[3]), flagged=()), "though layer 4 is undecided"),
        (varied(layers=(), flagged=()), "no layer was audited: nothing is claimed"),
        (
            varied(layers=LAYERS[:1], flagged=()),
            "no reference in the suite does better, in the 1 of 5 layers audited;",
        ),
        (
            varied(layers=LAYERS[:1], flagged=(), network_flagged=True, network=UNTRAINED),
            "no single layer is flagged, but the network is flagged (untrained)",
        ),
        (
            varied(network_flagged=True, network=UNTRAINED),
            "(layers 2, 3, 5), and the network is flagged (untrained)",
        ),
    ],
)
def test_the_headline_claims_no_more_than_was_found(result, expected):
    headline = unwrapped(result).split(" Checkpoint ")[0]
    assert expected in headline
    assert ("no reference in the suite does better" in headline) == ("does better" in expected)


def test_foreign_text_asks_for_other_data():
    text = unwrapped(varied(network={"ce": 4.96, "entropy": 1.25, "data_fit": "foreign"}))
    assert "foreign to the model (CE 4.960, entropy of the model's own predictions 1.250 nats/token)" in text
    assert "`surpassed` is hardly to be had on it; pass text like its training text with --data" in text
    assert "not known whether it suits the model" in unwrapped(
        varied(network={"data_fit": "unknown", "entropy": None})
    )


def test_network_flags_are_put_in_words():
    text = unwrapped(varied(network=UNTRAINED, network_flagged=True))
    assert "untrained: on this text the network does no better than the token frequencies alone" in text
    noted = varied(network={"flags": ("untrained",), "notes": ("Nothing was learned.",)})
    assert "Network Nothing was learned. Scan" in unwrapped(noted)  # what a note says is not said twice


def test_a_challenge_is_told_apart_from_a_witness_that_lowers_the_loss():
    challenged = replace(LAYERS[2], layer=4, reference=Reference("challenge", 4, 4, bits=16.0))
    text = unwrapped(varied(layers=(LAYERS[2], challenged), flagged=(3, 4)))
    assert f"surpassed (layer 3): {wording.MEANINGS['surpassed']}" in text
    assert f"surpassed (layer 4): {wording.CHALLENGED}" in text


def test_top_shows_the_highest_scores_by_layer_and_says_what_it_leaves_out():
    text = render_table([RESULT], top=2)
    assert [row.split()[1] for row in table_rows(text)] == ["3", "5"]
    words = unwrapped(RESULT, top=2)
    assert "3 left out by --top, of lower score: layers 1, 2, 4; flagged among them: layer 2." in words
    assert "layer 4: undecided" not in words
    assert "left out" not in unwrapped(RESULT, top=5)
    assert "; none of them flagged." in unwrapped(healthy(), top=1)
    with pytest.raises(UsageError, match="--top 0"):
        render_table([RESULT], top=0)


def test_runs_side_by_side_with_the_change_since_the_one_before():
    text = render_table(SERIES, width=80)
    assert table_rows(text, r"layer +#1") == [
        "    1  effective -0.2000  effective -0.2040 -0.0040  effective -0.2040 0.0000",
        "    2  effective -0.1000 !matched   -0.0002 +0.0998  matched   -0.0002 0.0000",
        "    3  effective -0.0667 !surpassed +0.0100 +0.0767 !surpassed +0.0100 0.0000",
        "    4  effective -0.0500  undecided -0.0021 +0.0479  -               -      -",
        "    5  effective -0.0400 !broken          -       -  -               -      -",
    ]
    words = unwrapped(*SERIES)
    assert "#2 ckpt-6000, id aaaa, step 6000; CE 1.810 (-0.050); 3 of 5 audited layers flagged" in words
    assert words.index("layer #1") < words.index("#3 ckpt-7000: 1 of 3 audited layers flagged (layer 3)")
    assert words.count("References ternary; seed 0") == 1  # what all runs share is said once


def test_no_change_is_given_between_checkpoints_of_different_depth():
    shallow = healthy(3)
    rows = table_rows(render_table([RESULT, shallow, shallow], width=80), r"layer +#1")
    assert [row.split()[-4:] for row in rows[:1]] == [["-", "effective", "-0.2000", "0.0000"]]
    words = unwrapped(RESULT, shallow)
    assert "No change is given for #2: the run before has another number of layers." in words


def test_what_spoils_a_comparison_is_said():
    other = varied(run={"checkpoint_id": "other"})
    assert "#1, #3 have one checkpoint id: they hold the same weights." in unwrapped(RESULT, other, RESULT)
    assert "one checkpoint id" not in unwrapped(RESULT, other)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("results", [[RESULT], SERIES, [healthy(40)] * 9])
def test_no_line_is_wider_than_the_page(results, width):
    for line in render_table(results, width=width).splitlines():
        assert cell_len(line) <= width
        assert line == line.rstrip()
        assert "…" not in line  # nor is it made to fit by cutting figures off


def test_a_series_too_wide_for_the_page_goes_on_below():
    text = render_table([healthy(4)] * 7, width=80)
    headers = [line.split() for line in text.splitlines() if line.startswith("layer  #")]
    assert [word for header in headers for word in header if word.startswith("#")] == [
        f"#{n}" for n in range(1, 8)
    ]
    assert len(headers) == 3


def test_colour_is_ansi_only_where_asked_for(monkeypatch):
    plain = render_table([RESULT], width=120)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    coloured = render_table([RESULT], width=120, color=True)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    assert "\x1b" not in plain
    assert "\x1b[32meffective\x1b[0m" in coloured
    assert (
        render_table([RESULT], width=120, color=True) == coloured
    )  # the caller decides, not the environment
    assert render_table([RESULT], width=120) == plain
    bare = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in bare.splitlines()] == plain.splitlines()


def test_markup_and_escapes_in_names_are_shown_not_obeyed():
    for results in ([hostile(HOSTILE)], [hostile(HOSTILE), RESULT]):
        text = render_table(results)
        assert text.replace("\n", "").isprintable()
        assert r"[red]x[/red]\x1b[31m\r\nlayer" in text
        codes = set(re.findall(r"\x1b(.[^A-Za-z]*.)", render_table(results, color=True)))
        assert codes <= {f"[{code}m" for code in ("0", "1", "2", "31", "32", "33", "36", "1;31")}


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1, max_size=60), st.sampled_from([40, 80, 120]))
def test_no_name_makes_a_line_too_wide_or_unprintable(name, width):
    for results in ([hostile(name)], [RESULT, hostile(name)]):
        for line in render_table(results, width=width).splitlines():
            assert line.isprintable()
            assert cell_len(line) <= width


@pytest.mark.parametrize(
    "command", ["::error::x", "::stop-commands::x", "##[error]x", "a " * 40 + "::error::x"]
)
def test_no_name_begins_a_workflow_command(command):
    """GitHub's runner reads what is printed, wherever it wraps; the annotations of --format github are its own."""
    for text in (render_table([hostile(command)], width=60), render_table([RESULT, hostile(command)])):
        assert "::" not in text
        assert "##[" not in text


def test_a_name_of_a_megabyte_does_not_flood_the_report():
    assert len(render_table([varied(run={"skipped": ("x" * 10**6,)})])) < 10_000


def test_figures_that_are_not_finite_are_shown_as_words():
    layer = replace(LAYERS[2], gap=float("nan"), gap_interval=(float("-inf"), float("inf")), fvu=float("inf"))
    (line,) = table_rows(render_table([varied(layers=(layer,))], width=120))
    row = " ".join(line.split())
    assert "nan [-inf, +inf] identity attention 0 16 inf" in row
    assert "CE nan nats/token" in unwrapped(varied(network={"ce": float("nan")}))


def test_without_results_or_with_no_layer_nothing_breaks_silently():
    with pytest.raises(ValueError, match="no results"):
        render_table([])
    assert "-----" not in render_table([varied(layers=(), flagged=())])
    assert "nothing is claimed" in unwrapped(varied(layers=(), flagged=()), varied(layers=(), flagged=()))


def test_widths_below_the_least_are_taken_as_the_least():
    assert render_table([RESULT], width=1) == render_table([RESULT], width=NARROWEST)
