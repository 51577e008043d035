"""Hidden states of any layout come back as they were, and one row of peel's layout is one token."""

from __future__ import annotations

import pytest
import torch

from peelcli.checkpoint.layout import Layout

N, S = 2, 6
# How a model lays out (n_seq, seq_len): as itself, in streams, streams first, with positions before the first token.
SHAPES = {
    "plain": lambda n, s: (n, s, 5),
    "streams": lambda n, s: (n, s, 4, 5),
    "streams first": lambda n, s: (4, n, s, 5),
    "few before": lambda n, s: (n, 3 + s, 5),
    "many before": lambda n, s: (n, 13 + s, 5),
}


def learned(name: str) -> Layout:
    shape = SHAPES[name]
    three = (torch.Size(shape(n, s)) for n, s in ((N, S), (2 * N, S), (N, S - 1)))
    layout = Layout.of(torch.Size((N, S)), *three)
    assert layout is not None
    return layout


@pytest.mark.parametrize("name", SHAPES)
def test_states_come_back_as_they_were(name: str) -> None:
    layout = learned(name)
    assert layout.is_plain == (name == "plain")
    for num, length in ((N, S), (3, 9)):
        hidden = torch.randn(SHAPES[name](num, length))
        rows = layout.rows(hidden)
        assert rows.shape[:2] == (num, length)
        assert torch.equal(layout.own(rows), hidden)


@pytest.mark.parametrize("name", ["streams", "streams first", "few before"])
def test_a_token_is_a_row(name: str) -> None:
    layout = learned(name)
    hidden = torch.zeros(SHAPES[name](N, S))
    rows = layout.rows(hidden)
    rows[1, 4, :5] = 1.0
    changed = layout.own(rows)
    before = layout.before
    assert torch.equal(
        changed.select(layout.axes[1], 4 + before).select(layout.axes[0], 1).sum(), torch.tensor(5.0)
    )
    assert changed.sum() == 5


def test_states_without_an_axis_of_tokens_are_not_understood() -> None:
    flat = (torch.Size((n * s, 5)) for n, s in ((N, S), (2 * N, S), (N, S - 1)))
    assert Layout.of(torch.Size((N, S)), *flat) is None
