"""Windows of token ids are what the file holds, begin where training did, and damage is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peelcli.calibration.token_files import read_segments
from peelcli.calibration.token_ids import Segment, TokenPool
from peelcli.errors import CalibrationError

BOS, EOS = 0, 1


def read(path: Path, vocab_size: int = 100, max_ids: int = 1 << 22) -> list[Segment]:
    return read_segments([path], vocab_size, max_ids, np.random.default_rng(0))


def windows(
    segments: list[Segment], seq_len: int, count: int, bos: int | None = BOS, eos: int | None = EOS
) -> tuple[np.ndarray, tuple[str, ...]]:
    return TokenPool(segments, bos, eos).rows(seq_len, count, np.random.default_rng(0))


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@settings(deadline=None)
@given(
    arrays(np.int64, st.integers(0, 400), elements=st.integers(0, 9)), st.integers(8, 20), st.integers(1, 30)
)
def test_windows_are_distinct_disjoint_stretches(stream: np.ndarray, seq_len: int, count: int) -> None:
    rows, _ = windows([Segment(stream, begins=False)], seq_len, count)
    assert rows.dtype == np.int64
    assert len(rows) <= count
    assert len(np.unique(rows, axis=0)) == len(rows)
    every = {stream[i : i + seq_len].tobytes() for i in range(len(stream) - seq_len + 1)}
    assert {row.tobytes() for row in rows} <= every
    assert len(rows) * seq_len <= len(stream)


def stream_of_documents(lengths: list[int], mark: int, ahead: bool) -> np.ndarray:
    """Documents of distinct ids from 2 on, each with its mark ahead or behind."""
    edges = np.cumsum([2, *lengths])
    documents = [np.arange(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return np.concatenate([[mark, *ids] if ahead else [*ids, mark] for ids in documents])


def test_windows_of_a_stream_begin_at_bos() -> None:
    stream = stream_of_documents([5, 30, 12, 7, 40, 33, 21], BOS, ahead=True)
    rows, notes = windows([Segment(stream[3:], begins=False)], 10, 5)
    assert len(rows) == 5
    assert (rows[:, 0] == BOS).all()
    assert notes == ()


def test_windows_of_a_stream_begin_behind_eos_where_there_is_no_bos() -> None:
    stream = stream_of_documents([5, 30, 12, 7, 40, 33, 21], EOS, ahead=False)
    starts = set((np.flatnonzero(stream == EOS) + 1).tolist())
    rows, notes = windows([Segment(stream, begins=False)], 10, 4, bos=None)
    assert {int(np.flatnonzero(stream == row[0])[0]) for row in rows} <= starts
    assert len(rows) == 4
    assert notes == ()


@pytest.mark.parametrize("bos", [None, BOS])
def test_too_few_marks_are_noted(bos: int | None) -> None:
    stream = np.concatenate([[BOS], np.arange(2, 400)])
    rows, notes = windows([Segment(stream, begins=False)], 10, 20, bos=bos, eos=None)
    assert len(rows) == 20
    assert any("start mid-document" in note for note in notes)


def test_rows_of_a_matrix_begin_sequences(tmp_path: Path) -> None:
    matrix = np.arange(2, 2 + 40 * 25).reshape(40, 25).astype(np.uint16)
    segments = read(saved(tmp_path / "a.npy", matrix), vocab_size=2000)
    rows, notes = windows(segments, 10, 30, bos=None)
    assert notes == ()
    assert len(rows) == 30
    assert set(rows[:, 0].tolist()) <= set(matrix[:, 0].tolist())
    assert rows.dtype == np.int64, "unsigned ids would wrap, and torch has no use for them"
    more, notes = windows(segments, 10, 70, bos=None)
    assert len(more) == 70
    assert any("mid-document" in note for note in notes)
    for row in more:  # no window runs from one row into the next
        assert (row[0] - 2) // 25 == (row[-1] - 2) // 25


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint64, ">i4"])
def test_npy_streams_come_back_as_they_were(tmp_path: Path, dtype: str) -> None:
    ids = np.random.default_rng(0).integers(0, 100, 300)
    (segment,) = read(saved(tmp_path / "a.npy", ids.astype(dtype)))
    np.testing.assert_array_equal(segment.ids, ids)
    assert not segment.begins


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_bin_is_uint16_or_uint32_by_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    ids = np.random.default_rng(0).integers(0, vocab_size, 300)
    ids.astype(dtype).tofile(tmp_path / "a.bin")
    (segment,) = read(tmp_path / "a.bin", vocab_size)
    np.testing.assert_array_equal(segment.ids, ids)


def test_a_long_stream_is_read_in_slices(tmp_path: Path) -> None:
    ids = np.arange(1_000_000) % 50_021
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    segments = read(tmp_path / "a.bin", 60_000, max_ids=200_000)
    assert sum(len(segment.ids) for segment in segments) <= 200_000
    assert len(segments) > 1
    for segment in segments:
        assert (np.diff(segment.ids.astype(np.int64)) % 50_021 == 1).all()


def test_a_tall_matrix_is_read_in_spread_rows(tmp_path: Path) -> None:
    matrix = np.repeat(np.arange(5000)[:, None], 10, axis=1)
    segments = read(saved(tmp_path / "a.npy", matrix), 5000, max_ids=1000)
    first = [int(segment.ids[0]) for segment in segments]
    assert len(first) == 100
    assert all(50 * i <= row < 50 * (i + 1) for i, row in enumerate(first))


@pytest.mark.parametrize("bad", [-1, 100, 2**40])
def test_ids_outside_the_vocabulary_name_id_place_and_vocabulary(tmp_path: Path, bad: int) -> None:
    ids = np.zeros(50, dtype=np.int64)
    ids[[37, 44]] = bad
    with pytest.raises(CalibrationError, match=rf"token id {bad} at position 37 of .*a\.npy.* 100 entries"):
        read(saved(tmp_path / "a.npy", ids))
    with pytest.raises(CalibrationError, match=rf"token id {bad} at row 3, column 7 of .*b\.npy"):
        read(saved(tmp_path / "b.npy", ids.reshape(5, 10)))


def test_the_place_in_a_sliced_stream_is_the_place_in_the_file(tmp_path: Path) -> None:
    ids = np.zeros(1_000_000, dtype="<u2")
    ids[900_000:] = 100
    ids.tofile(tmp_path / "a.bin")
    with pytest.raises(CalibrationError, match=r"token id 100 at position 9\d{5} of"):
        read(tmp_path / "a.bin", max_ids=700_000)


def test_a_wide_unsigned_id_does_not_wrap(tmp_path: Path) -> None:
    ids = np.zeros(50, dtype=np.uint64)
    ids[3] = 2**64 - 1
    with pytest.raises(CalibrationError, match=f"token id {2**64 - 1} at position 3"):
        read(saved(tmp_path / "a.npy", ids))


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros(50), r"float64 \(50,\)"),
        (np.zeros(50, dtype=bool), r"bool \(50,\)"),
        (np.zeros((2, 3, 4), dtype=np.int64), r"int64 \(2, 3, 4\)"),
        (np.int64(3), r"int64 \(\)"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, array: np.ndarray, found: str) -> None:
    with pytest.raises(CalibrationError, match=found):
        read(saved(tmp_path / "a.npy", array))


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"expected a \.npy array of token ids"):
        read(saved(tmp_path / "a.npy", np.array([{"ids": [1, 2]}, None], dtype=object)))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.npy", np.zeros(500, dtype=np.int64)).read_bytes()
    np.savez(tmp_path / "c.npz", ids=np.zeros(5, dtype=np.int64))
    archive = (tmp_path / "c.npz").read_bytes()
    for content in (whole[:-100], whole[:20], b"", b"not numpy", archive):
        (tmp_path / "b.npy").write_bytes(content)
        with pytest.raises(CalibrationError, match=r"b\.npy: expected"):
            read(tmp_path / "b.npy")
    for content in (b"", b"123"):
        (tmp_path / "b.bin").write_bytes(content)
        with pytest.raises(CalibrationError, match=r"b\.bin: expected uint16 token ids.*found \d bytes"):
            read(tmp_path / "b.bin")
