"""One layer in words: everything that was measured on it, and advice that follows from the figures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hand_made import LAYERS, RESULT, healthy, hostile, varied
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from long_series import series
from rich.cells import cell_len

from peelcli.errors import UsageError
from peelcli.records import KINDS, VERDICTS, Finding, FitOutcome, Reference, Score
from peelcli.report import render_explanation
from peelcli.report.explain import FIELD_WORDS
from peelcli.report.json_format import report_schema
from peelcli.report.remedies import remedies

ALONE = FitOutcome("trained", 40, True, "the loss on select no longer falls", seconds=1.0)


def words(*results, layer=3, **options):
    return " ".join(render_explanation(results, layer, **options).split())


def trained_alone(gains, verdict=LAYERS[2]):
    """A result whose layers, by number, gain so much when each is trained on alone."""
    scores = tuple(
        Score(Reference("challenge", n, n, bits=16.0), ALONE, (1.8,), (1.8 - gain, 1.92 - gain), (0.1,))
        for n, gain in gains.items()
    )
    return varied(run={"scores": scores}, layers=(verdict,))


def test_every_kind_of_reference_has_the_fields_word():
    assert set(FIELD_WORDS) == set(KINDS)


def test_it_gives_the_fields_word_for_the_kinds_that_were_tried():
    assert "identity: layer ablation" in " ".join(render_explanation([RESULT], 3, width=100).split())


def test_it_says_what_was_tried_and_what_each_cost():
    text = words(*series(6, 8))
    assert "Layer 3 of checkpoint-800, id 000000000008, step 800: surpassed, flagged" in text
    for reference in ("identity attn", "direct attn ternary", "direct mlp ternary", "identity mlp"):
        assert f"{reference} 1.58 -0." in text
    assert "Of 6 layers it is number 1 from the most under-optimised on (score +0.0301)." in text
    assert "checkpoint-400 effective -0.0742" in text
    assert "checkpoint-500 surpassed !" in text
    assert "Train on with a higher learning rate for it." in text


def test_the_cost_in_other_layers_stands_beside_the_layers_own():
    def with_drop(layer, gap):
        return Score(Reference("identity", layer, layer), ALONE, (1.8,), (1.8 - gap, 1.92 - gap), (0.1,))

    costs = {1: -2.0, 2: -0.5, 3: -0.01, 4: -0.7}
    result = varied(run={"scores": tuple(with_drop(n, gap) for n, gap in costs.items())})
    assert "identity 0 -0.0100 -0.7000 0.1000" in words(result)  # the median of the three others
    alone = varied(run={"scores": (with_drop(3, -0.01),)})
    assert "identity 0 -0.0100 - 0.1000" in words(alone)


def test_what_a_part_of_the_text_settled_is_said():
    losses = tuple(1.8 for _ in range(16))
    scores = tuple(
        Score(Reference("identity", 3, 3, part), ALONE, (), losses[::stride], losses[::stride])
        for part, stride in ((None, 2), ("mlp", 1))
    )
    said = "1 of the 2 references tried were measured on 8 of the 16 sequences alone"
    assert said in words(varied(run={"nll_eval": losses, "scores": scores}))
    assert "sequences alone" not in words(varied(run={"nll_eval": losses, "scores": scores[1:]}))


def test_findings_and_copies_of_a_layer_are_named():
    result = varied(
        run={
            "findings": (Finding("identical-layer", "as in step 100", 3), Finding("non-finite", "x", 2)),
            "layer_hashes": {"1": "aa", "3": "aa", "2": "bb"},
        }
    )
    text = words(result)
    assert "identical-layer in layer 3: as in step 100" in text
    assert "The same weights, byte for byte, stand in layers 1, 3." in text
    assert "non-finite" not in text


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({3: 0.08, 1: 0.01, 2: 0.012}, "raise it for this layer: trained on alone it gains 0.0800 nats"),
        ({3: 0.02, 1: 0.019, 2: 0.018}, "as for the others: trained on alone it gains 0.0200 nats, where"),
        ({3: 0.02}, "and there is no other layer to compare with"),
        ({1: 0.02}, "not known: the layer was not trained on alone (add challenge to --references"),
    ],
)
def test_the_learning_rate_follows_from_training_layers_alone(gains, expected):
    assert expected in words(trained_alone(gains))


def test_a_rollback_lowers_the_rate_and_is_not_reinitialised():
    reference = Reference("rollback", 3, 3, bits=16.0, origin_id="abc", origin_step=400)
    found = remedies(varied(), replace(LAYERS[2], reference=reference))
    assert found["learning rate"].startswith("lower it from there on")
    assert "older block" in found["re-initialise"]


def test_freezing_is_offered_only_where_training_the_layer_gains_next_to_nothing():
    effective = replace(LAYERS[0], layer=3)
    assert "possible" in remedies(trained_alone({3: 0.0004, 1: 0.01}, effective), effective)["freeze"]
    assert "possible" not in remedies(trained_alone({3: 0.02, 1: 0.01}, effective), effective)["freeze"]
    assert remedies(trained_alone({3: 0.0004, 1: 0.01}), LAYERS[2])["freeze"] == "no: this layer is to move."


def test_dropping_is_possible_only_where_that_is_what_matched():
    dropped = replace(LAYERS[1], reference=Reference("identity", 2, 2))
    assert remedies(RESULT, dropped)["drop"].startswith("possible: leaving it out costs 0.0104 nats")
    for verdict in LAYERS[:4]:
        assert not remedies(RESULT, verdict)["drop"].startswith("possible")


def test_a_layer_that_low_bits_cost_most_is_to_keep_its_bits():
    def direct(layer, gap):
        reference = Reference("direct", layer, layer, scheme="ternary", bits=1.58)
        return Score(reference, ALONE, (1.8,), (1.8 - gap, 1.92 - gap), (0.1,))

    effective = replace(LAYERS[0], layer=3, effective_bits=None)
    result = varied(run={"scores": (direct(1, -0.1), direct(2, -0.1), direct(3, -0.9))}, layers=(effective,))
    told = remedies(result, effective)["precision"]
    assert told.startswith("keep its 16 bits: no reference of fewer did as well; in ternary it costs 0.9000")
    even = varied(run={"scores": (direct(1, -0.1), direct(2, -0.1), direct(3, -0.1))}, layers=(effective,))
    assert remedies(even, effective)["precision"] == "keep its 16 bits: no reference of fewer did as well."


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_verdict_has_remedies_that_do_not_contradict_it(verdict):
    found = remedies(RESULT, replace(LAYERS[2], verdict=verdict))
    if verdict == "broken":
        assert list(found) == ["first"]
    else:
        assert list(found) == ["learning rate", "freeze", "re-initialise", "precision", "drop"]
    assert all(sentence.endswith(".") for sentence in found.values())


def test_json_has_the_parts_that_the_report_has():
    schema = report_schema()
    results = series(6, 3)
    found = json.loads(render_explanation(results, 2, "json"))
    for key, part in (("layer", "layer"), ("tried", "measured_reference")):
        rule = {"$ref": f"#/$defs/{part}", "$defs": schema["$defs"]}
        for item in found[key] if key == "tried" else [found[key]]:
            Draft202012Validator(rule).validate(item)
    assert len(found["tried"]) == 6
    assert [entry["step"] for entry in found["history"]] == [100, 200, 300]
    assert found["training"] == remedies(results[-1], results[-1].layers[1])


def test_a_layer_that_was_not_audited_is_named_with_those_that_were():
    with pytest.raises(UsageError, match=r"layer 9: not audited on ckpt-5000, only layers 1-5"):
        render_explanation([RESULT], 9)
    with pytest.raises(UsageError, match="expected one of table, json"):
        render_explanation([RESULT], 3, "xml")
    assert "not audited" in words(healthy(2), RESULT)  # in the history


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1, max_size=60), st.sampled_from([40, 80, 120]))
def test_no_name_makes_a_line_too_wide_or_unprintable(name, width):
    text = render_explanation([RESULT, hostile(name)], 3, width=width)
    for line in text.splitlines():
        assert line.isprintable()
        assert cell_len(line) <= width
    assert render_explanation([hostile(name)], 3, "json").isascii()
