"""The JSON report: its schema, its spine, and what it promises to any parser."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import pytest
from hand_made import DIRECT, LAYERS, RESULT, RUN, healthy, varied
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from peelcli.errors import UsageError
from peelcli.report.json_format import render_json, report_schema

HOSTILE = "[red]x[/red]\x1b[31m\n\x00\u202e\udc80"
VALIDATOR = Draft202012Validator(report_schema())
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def parsed(*results, **options):
    """The report, read by a parser that takes no NaN and no key twice, and validated."""

    def unique(pairs):
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    def no_constant(name):
        raise AssertionError(f"bare {name}")

    text = render_json(results, **options)
    report = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    VALIDATOR.validate(report)
    return report


def test_schema_is_itself_valid():
    Draft202012Validator.check_schema(report_schema())


def test_spine_is_as_published():
    report = parsed(RESULT)
    (run,) = report["runs"]
    assert (report["schema"], report["schema_version"], report["flagged"]) == ("peel/report", 1, True)
    assert (run["checkpoint"], run["step"], run["num_layers"]) == ("/runs/a/ckpt-5000", 5000, 5)
    assert run["tokens"] == {"fit": 16384, "select": 8192, "eval": 16384}
    assert {key: run["network"][key] for key in ("ce", "perplexity", "zone", "flags")} == {
        "ce": 1.86,
        "perplexity": 6.4237,
        "zone": None,
        "flags": [],
    }
    layer = run["layers"][2]
    assert {key: value for key, value in layer.items() if key not in ("advice", "notes", "own_bits")} == {
        "layer": 3,
        "verdict": "surpassed",
        "flagged": True,
        "sublayer": "attention",
        "score": 0.01,
        "gap": 0.01,
        "gap_interval": [0.006, 0.014],
        "reference": {
            "kind": "identity",
            "layer": 3,
            "target": 3,
            "sublayer": "attention",
            "scheme": None,
            "group_size": None,
            "bits": 0.0,
            "origin_id": None,
            "origin_step": None,
            "key": "identity-003-attention",
        },
        "effective_bits": 0.0,
        "fvu": None,
        "drop_cost": 0.21,
        "reason": "dropping its attention lowers the loss by 0.0100",
    }


def test_every_measured_reference_has_its_gap_over_eval():
    dropped, direct = parsed(RESULT)["runs"][0]["references"]
    assert dropped["gap"] == pytest.approx(0.01)  # (1.80 + 1.92) / 2 - (1.79 + 1.91) / 2
    assert direct["gap"] == pytest.approx(-0.0002)
    assert (direct["fvu"], direct["fvu_fit"]) == (0.0421, 0.04)
    assert direct["kl"] == pytest.approx(0.02)
    assert direct["sequences"] == 2
    assert (direct["key"], direct["converged"], direct["steps"]) == (DIRECT.key, False, 80)


def test_every_key_that_is_written_is_documented():
    schema = report_schema()
    run, network = parsed(RESULT)["runs"][0], parsed(RESULT)["runs"][0]["network"]
    documented = {
        name: set(part["properties"]) for name, part in schema["$defs"].items() if "properties" in part
    }
    assert set(parsed(RESULT)) == set(schema["properties"])
    assert set(run) == documented["run"]
    assert set(network) == documented["network"]
    assert set(run["layers"][2]) == documented["layer"]
    assert set(run["layers"][2]["reference"]) == documented["reference"]
    assert set(run["references"][0]) == documented["reference"] | documented["measured_reference"]
    assert set(run["findings"][0]) == documented["finding"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: report.pop("flagged"),
        lambda report: report["runs"][0]["layers"][0].update(verdict="fine"),
        lambda report: report["runs"][0]["layers"][0].update(gap="0.1"),
        lambda report: report["runs"][0]["layers"][0].update(layer=0),
        lambda report: report["runs"][0]["references"][0].pop("kind"),
        lambda report: report["runs"][0]["network"].pop("zone"),
        lambda report: report["runs"].clear(),
    ],
)
def test_schema_refuses_what_breaks_the_spine(spoil):
    report = parsed(RESULT)
    spoil(report)
    assert not VALIDATOR.is_valid(report)


@settings(deadline=None)
@given(st.floats(), st.floats(), st.floats(), st.dictionaries(st.text(), anything, max_size=4))
def test_no_figure_makes_it_invalid(gap, low, ce, config):
    layer = replace(LAYERS[2], gap=gap, gap_interval=(low, gap), score=ce, fvu=low)
    result = varied(layers=(layer,), run={"config": config, "seconds": low}, network={"ce": ce})
    (run,) = parsed(result)["runs"]
    assert run["layers"][0]["gap"] == (gap if math.isfinite(gap) else None)
    assert run["network"]["ce"] == (ce if math.isfinite(ce) else None)


def test_names_survive_unchanged_and_are_plain_ascii_on_the_wire():
    result = varied(run={"checkpoint": HOSTILE, "skipped": (HOSTILE,), "data": HOSTILE})
    text = render_json([result])
    assert text.isascii()
    assert all(char.isprintable() or char == "\n" for char in text)
    (run,) = json.loads(text)["runs"]
    assert (run["checkpoint"], run["skipped"], run["data"]) == (HOSTILE, [HOSTILE], HOSTILE)


def test_timing_alone_tells_two_runs_of_the_same_audit_apart():
    slower_scores = tuple(replace(s, fit=replace(s.fit, seconds=s.fit.seconds + 9)) for s in RUN.scores)
    slower = varied(run={"seconds": 99.0, "scores": slower_scores})
    first, second = parsed(RESULT), parsed(slower)
    assert first != second
    assert first["runs"][0].pop("timing")["fits"][DIRECT.key] == 1.5
    assert second["runs"][0].pop("timing")["seconds"] == 99.0
    assert first == second


def test_it_ends_with_one_newline_and_repeats_itself_exactly():
    text = render_json([RESULT, healthy()])
    assert text.endswith("}\n")
    assert text == render_json([RESULT, healthy()])


def test_flagged_follows_layers_and_network_of_any_run():
    assert parsed(healthy())["flagged"] is False
    assert parsed(healthy(), RESULT)["flagged"] is True
    network = parsed(varied(flagged=(), network_flagged=True))
    assert (network["flagged"], network["runs"][0]["flagged"], network["runs"][0]["flagged_layers"]) == (
        True,
        True,
        [],
    )


def test_top_lists_what_it_leaves_out():
    (run,) = parsed(RESULT, top=2)["runs"]
    assert [layer["layer"] for layer in run["layers"]] == [3, 5]  # the highest score, and the broken layer
    assert run["layers_left_out"] == [1, 2, 4]
    assert parsed(RESULT)["runs"][0]["layers_left_out"] == []
    with pytest.raises(UsageError, match="--top 0"):
        render_json([RESULT], top=0)


def test_config_takes_numpy_and_paths_and_names_what_it_cannot_take():
    config = {"alpha": np.float32(0.5), "n": np.int64(3), "path": PurePosixPath("a/b"), "layers": (1, 2)}
    (run,) = parsed(varied(run={"config": config}))["runs"]
    assert run["config"] == {"alpha": 0.5, "n": 3, "path": "a/b", "layers": [1, 2]}
    with pytest.raises(TypeError, match=r"report\.runs\[0\]\.config\.bad is a set"):
        render_json([varied(run={"config": {"bad": {1}}})])
