"""The split: nothing is lost, nothing is in two parts, and the parts are interleaved over the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peelcli.calibration.split import (
    MIN_SEQUENCES,
    Split,
    shrink_counts,
    split_rows,
    spread_indices,
    unique_rows,
    wanted_counts,
)

counts = st.integers(MIN_SEQUENCES, 500)


@given(st.tuples(counts, counts, counts), st.integers(3 * MIN_SEQUENCES, 2000))
def test_shrinking_uses_all_that_is_there_and_keeps_proportions(
    wanted: tuple[int, int, int], available: int
) -> None:
    got = shrink_counts(wanted, available)
    assert sum(got) == min(available, sum(wanted))
    for want, count in zip(wanted, got, strict=True):
        assert MIN_SEQUENCES <= count <= want
    # Where the minimum binds nowhere, each part is within rounding of its share.
    shares = [want * sum(got) / sum(wanted) for want in wanted]
    if min(shares) >= MIN_SEQUENCES:
        assert all(abs(count - share) <= 2 for count, share in zip(got, shares, strict=True))


def test_budgets_are_whole_sequences_and_never_below_the_minimum() -> None:
    assert wanted_counts({"fit": 1000, "select": 5, "eval": 800}, 100) == (10, MIN_SEQUENCES, MIN_SEQUENCES)


def test_parts_are_disjoint_exhaustive_and_interleaved() -> None:
    rows = np.arange(120)[:, None] * np.ones((1, 4), dtype=np.int64)
    split = split_rows(rows.astype(np.int64), (60, 30, 30), seed=3)
    parts = [part[:, 0].tolist() for part in (split.fit, split.select, split.eval)]
    assert [len(part) for part in parts] == [60, 30, 30]
    assert sorted(sum(parts, [])) == list(range(120))
    for part in parts:
        assert part == sorted(part)
        quarters = np.histogram(part, bins=4, range=(0, 120))[0]
        assert quarters.min() > 0, "a part leaves a quarter of the text out"


def test_slices_name_the_rows_of_each_part() -> None:
    rows = np.arange(90, dtype=np.int64).reshape(30, 3)
    split = split_rows(rows, (14, 8, 8), seed=0)
    assert list(split.slices) == ["fit", "select", "eval"]
    for part, where in split.slices.items():
        np.testing.assert_array_equal(split.sequences[where], getattr(split, part))


def test_the_hash_follows_ids_order_and_division() -> None:
    rows = np.arange(96, dtype=np.int64).reshape(32, 3)
    same = {split_rows(rows, (16, 8, 8), seed=5).content_hash for _ in range(2)}
    assert len(same) == 1
    others = {split_rows(rows, (16, 8, 8), seed=6).content_hash}
    others |= {split_rows(rows, (12, 12, 8), seed=5).content_hash}
    others |= {split_rows(rows + 1, (16, 8, 8), seed=5).content_hash}
    assert len(others | same) == 4
    moved = [Split(rows[:a], rows[a:b], rows[b:]).content_hash for a, b in ((8, 16), (8, 20), (16, 24))]
    assert len(set(moved)) == 3, "the same sequences in other parts are another calibration"


@given(st.integers(1, 300), st.integers(0, 700), st.integers(0, 9))
def test_spread_indices_take_one_of_each_stretch(count: int, extra: int, seed: int) -> None:
    total = count + extra
    indices = spread_indices(total, count, np.random.default_rng(seed))
    assert len(indices) == count
    for i, index in enumerate(indices):
        assert i * total // count <= index < (i + 1) * total // count


@pytest.mark.parametrize("dtype", [np.int64, np.uint16])
def test_unique_rows_keep_the_first_of_each_in_order(dtype: type) -> None:
    rows = np.array([[3, 1], [2, 2], [3, 1], [1, 3], [2, 2]], dtype=dtype)
    np.testing.assert_array_equal(unique_rows(rows), [[3, 1], [2, 2], [1, 3]])
