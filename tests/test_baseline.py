"""What a baseline keeps comes back, and is enough; what is none, is refused with what to do."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peelcli.errors import ArtefactError, ResourceError, UsageError
from peelcli.records import AuditResult, FitOutcome, Reference, Run, Score
from peelcli.records.from_json import from_json
from peelcli.tracking.baseline import read_baseline, write_baseline
from peelcli.verdict import Policy, judge, with_comparisons

POLICY = Policy(fail_on=("regressed",))
FIT = FitOutcome("none", 0, True, "nothing is fitted")


def run_of(seed: int = 0, **fields: Any) -> Run:
    """Three layers, eight sequences, three references each and one of the ladder."""
    losses = [1.0 + 0.013 * ((seed + i) % 7) for i in range(8)]
    scores = []
    for layer in (1, 2, 3):
        for reference, cost in (
            (Reference("identity", layer, layer), 0.9),
            (Reference("direct", layer, layer, None, "ternary", None, 1.584962500721156), 0.2),
            (Reference("direct", layer, layer, None, "int4", None, 4.0), 0.01),
        ):
            worse = tuple(x + cost + 0.001 * i * layer for i, x in enumerate(losses))
            scores.append(Score(reference, FIT, worse, worse, (cost,) * 8))
    described: dict[str, Any] = {
        "checkpoint": "run/checkpoint-1", "checkpoint_id": f"id{seed}", "num_layers": 3, "layers": (1, 2, 3),
        "seed": 0, "tokens": {"fit": 64, "select": 64, "eval": 64}, "seq_len": 8, "data": "text", "vocab_size": 97,
        "data_hash": "a", "scheme": "ternary", "nll_select": tuple(losses), "nll_eval": tuple(losses),
        "entropy_eval": tuple(losses), "unigram_ce": 4.0, "layer_bits": (32.0,) * 3, "family": "Llama",
        "scores": tuple(scores), "layer_hashes": {"1": "a", "2": "b", "3": f"c{seed}"},
        "config": {"fit": {"start": None}},
    }  # fmt: skip
    return Run(**{**described, **fields})


def test_a_baseline_compares_as_the_audit_itself(tmp_path: Path) -> None:
    first, second = (judge(run_of(seed), POLICY) for seed in (0, 3))
    write_baseline(tmp_path / "b.json", first)
    kept = read_baseline(tmp_path / "b.json")
    direct = with_comparisons([first, second], POLICY)[-1].comparison
    through = with_comparisons([second], POLICY, kept)[-1].comparison
    assert direct is not None
    assert through is not None
    assert replace(through, is_baseline=False, layers=(), ce_change=0, ce_change_interval=None) == replace(
        direct, layers=(), ce_change=0, ce_change_interval=None
    )
    assert through.ce_change == pytest.approx(direct.ce_change, abs=1e-6)
    for mine, its in zip(through.layers, direct.layers, strict=True):
        assert (mine.status, mine.before, mine.after, mine.reference) == (
            its.status,
            its.before,
            its.after,
            its.reference,
        )
        assert mine.gap_change == pytest.approx(its.gap_change, abs=1e-6)
    assert kept.unmoved == first.unmoved
    assert {s.reference.scheme for s in kept.run.scores} == {None, "ternary"}  # the ladder decides nothing


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    result = judge(run_of(), POLICY)
    path = tmp_path / "b.json"
    path.write_text("what was there")
    with pytest.raises(UsageError, match="nothing was measured"):
        write_baseline(path, replace(result, run=replace(result.run, data_hash="", nll_eval=())))
    with pytest.raises(ResourceError, match="No such file"):
        write_baseline(tmp_path / "absent" / "b.json", result)
    assert path.read_text() == "what was there"
    assert os.listdir(tmp_path) == ["b.json"]


NO_BASELINES = {
    "": "damaged one",
    "{": "damaged one",
    "[1]": "found 'list'",
    '{"schema": "peel/report"}': "found 'peel/report'",
    '{"schema": "peel/baseline", "schema_version": 2}': "use the peel that wrote it",
    '{"schema": "peel/baseline", "schema_version": 1}': "damaged",
    "[" * 100_000: "damaged one",
}


@pytest.mark.parametrize("text", NO_BASELINES, ids=lambda text: text[:20])
def test_what_is_no_baseline_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(ArtefactError) as refused:
        read_baseline(tmp_path / "b.json")
    assert NO_BASELINES[text] in str(refused.value)
    assert "--write-baseline" in str(refused.value)
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_baseline(tmp_path / "absent.json")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
WHOLE = json.loads(json.dumps(asdict(judge(run_of(), POLICY))))


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, by the keys that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in items for place in places(item, (*at, key)))]


PLACES = places(WHOLE)[1:]


@settings(max_examples=150)
@given(place=st.sampled_from(PLACES), value=anything)
def test_a_damaged_record_is_told_or_is_still_one(place: tuple[Any, ...], value: Any) -> None:
    spoilt = json.loads(json.dumps(WHOLE))
    inner = spoilt
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    told = None
    try:
        from_json(AuditResult, spoilt)  # whatever it raises else is a mistake
    except ValueError as error:
        told = str(error)
    assert told is None or str(place[0]) in told


def test_a_record_comes_back_as_it_was() -> None:
    result = judge(run_of(), POLICY)
    assert from_json(AuditResult, WHOLE) == result
    assert from_json(AuditResult, {**WHOLE, "of a later version": 1}) == result
