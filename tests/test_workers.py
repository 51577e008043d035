"""Work at once gives the results of work in turn, in order, and lets nothing leak."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from peelcli.runtime.workers import in_parallel, one_thread


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("at_once", [True, False])
def test_results_come_in_order_and_without_gradients(at_once: bool) -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    found = list(in_parallel(lambda n: weight * n, range(20), at_once=at_once))
    assert [float(f[0, 0]) for f in found] == list(range(20))
    assert not any(f.requires_grad for f in found)


def test_each_piece_is_computed_by_one_thread() -> None:
    assert set(in_parallel(lambda _: torch.get_num_threads(), range(6), at_once=True)) == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("alone", [True, False])
def test_one_thread_is_for_a_while_even_where_it_fails(alone: bool) -> None:
    def failing() -> None:
        with one_thread(alone=alone):
            assert torch.get_num_threads() == (1 if alone else 2)
            raise ValueError("as it would")

    with pytest.raises(ValueError, match="as it would"):
        failing()
    assert torch.get_num_threads() == 2


def test_threads_stay_from_call_to_call() -> None:
    def ident(_: int) -> int:
        return threading.get_ident()

    assert len({i for _ in range(5) for i in in_parallel(ident, range(6), at_once=True)}) <= 2


def test_items_are_drawn_as_they_are_needed() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for n in range(100):
            drawn.append(n)
            yield n

    results = in_parallel(lambda n: n, items(), at_once=True)
    assert next(results) == 0
    assert len(drawn) <= 4
    results.close()
    assert torch.get_num_threads() == 2


def test_an_error_ends_the_work_and_is_seen() -> None:
    def fail(n: int) -> int:
        if n == 3:
            raise ValueError("the third")
        return n

    with pytest.raises(ValueError, match="the third"):
        list(in_parallel(fail, range(50), at_once=True))
    assert torch.get_num_threads() == 2
