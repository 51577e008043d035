"""Padding is not text: it is cut out of token ids wherever it stands, and the report says how much there was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peelcli.calibration import Calibration, build_calibration
from peelcli.calibration.padding import without_padding
from peelcli.calibration.token_ids import Segment
from peelcli.errors import CalibrationError
from peelcli.records.special_ids import SpecialIds

PAD, BOS, EOS = 0, 1, 2
MARKS = SpecialIds(frozenset({BOS}), frozenset({EOS}), frozenset({PAD}))
BUDGETS = {"fit": 512, "select": 256, "eval": 512}


def texts(rows: int = 60, length: int = 64) -> np.ndarray:
    """Rows of ids that are no marks, each after BOS."""
    ids = np.random.default_rng(0).integers(3, 97, size=(rows, length))
    ids[:, 0] = BOS
    return ids


def build(tmp_path: Path, ids: np.ndarray, special: SpecialIds = MARKS, **changes: object) -> Calibration:
    np.save(tmp_path / "ids.npy", ids)
    options = {"vocab_size": 97, "max_positions": 64, "seq_len": 32, "tokens": BUDGETS, "seed": 0}
    return build_calibration([tmp_path / "ids.npy"], None, special=special, **{**options, **changes})  # type: ignore[arg-type]


def behind(ids: np.ndarray) -> None:
    ids[::2, 40:] = PAD
    ids[1::2, 63:] = PAD  # rows that lack one token only


def ahead(ids: np.ndarray) -> None:
    ids[:, :20] = PAD


def between(ids: np.ndarray) -> None:
    ids[:, 33:37] = PAD


@pytest.mark.parametrize("pad", [behind, ahead, between])
@pytest.mark.parametrize("flat", [False, True])
def test_no_padding_is_scored_or_counted(pad: object, flat: bool, tmp_path: Path) -> None:
    ids = texts()
    pad(ids)  # type: ignore[operator]
    got = build(tmp_path, ids.reshape(-1) if flat else ids)
    assert (got.split.sequences != PAD).all()
    assert got.tokens == BUDGETS
    (found,) = got.findings
    assert found.kind == "padding"
    assert f"{(ids == PAD).sum():,} of the {ids.size:,} token ids in ids.npy are padding" in found.message
    assert f"(id 0: {(ids == PAD).sum():,})" in found.message


def test_rows_that_are_too_short_without_their_padding_run_on(tmp_path: Path) -> None:
    ids = texts(rows=200)
    ids[:, 20:] = PAD
    got = build(tmp_path, ids)
    assert (got.split.sequences != PAD).all()
    assert got.split.sequences.shape[1] == 32
    assert (got.split.sequences[:, 0] == BOS).all(), "each begins where a row begins"
    assert any("run on into the next row" in note for note in got.notes)


def test_repeated_eos_is_padding_and_one_stays(tmp_path: Path) -> None:
    ids = texts()
    ids[:, 40:] = EOS
    got = build(tmp_path, ids, SpecialIds(frozenset({BOS}), frozenset({EOS})))
    assert ((got.split.sequences == EOS).sum(axis=1) <= 1).all()
    assert f"id {EOS}: {23 * 60:,}" in got.findings[0].message
    kept, removed = without_padding([Segment(ids[0], begins=True)], MARKS)
    assert kept[0].ids.tolist() == ids[0, :41].tolist()
    assert removed == {EOS: 23}


def test_padding_that_nothing_names_is_known_by_how_rows_end(tmp_path: Path) -> None:
    ids = texts()
    ids[::2, 40:] = 50
    got = build(tmp_path, ids, SpecialIds())
    assert f"id 50: {24 * 30}" in got.findings[0].message
    assert not (got.split.sequences[:, -4:] == 50).all(axis=1).any()


def test_a_pad_token_that_is_used_as_text_stays(tmp_path: Path) -> None:
    """As where the pad token is the unknown token: single ones between others are text."""
    ids = texts()
    ids[:, 10:30:5] = PAD
    ids[::2, 50:] = PAD
    got = build(tmp_path, ids)
    assert f"id 0: {14 * 30}" in got.findings[0].message
    assert (got.split.sequences == PAD).any()


def test_nothing_but_padding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"ids\.npy.*nothing but padding \(id 0\); pass other data"):
        build(tmp_path, np.zeros((60, 64), dtype=np.int64))


def test_text_without_padding_is_taken_as_it_is(tmp_path: Path) -> None:
    ids = texts()
    got, plain = build(tmp_path, ids), build(tmp_path, ids, SpecialIds())
    assert got.findings == ()
    assert got.content_hash == plain.content_hash


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=30), min_size=1, max_size=6), st.booleans())
def test_what_is_left_and_what_is_cut_are_the_whole(rows: list[list[int]], begins: bool) -> None:
    segments = [Segment(np.array(row), begins=begins) for row in rows]
    kept, removed = without_padding(segments, MARKS)
    assert sum(len(s.ids) for s in kept) + sum(removed.values()) == sum(map(len, rows))
    assert all(len(s.ids) for s in kept)
    others = [[i for s in some for i in s.ids if i > EOS] for some in (segments, kept)]
    if not set(removed) - {PAD, BOS, EOS}:
        assert others[0] == others[1], "no token of the text is lost, and their order stays"
