"""A reference that was measured on some sequences is held against the trained network on the very same ones."""

from __future__ import annotations

import pytest

from peelcli.records import FitOutcome, Reference, Score


@pytest.mark.parametrize("count", [8, 9, 31, 32, 33, 63, 64, 65, 1000])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_losses_beside_a_score_are_of_its_own_sequences(count: int, stride: int) -> None:
    stride = min(stride, count // 8)
    trained = tuple(float(n) for n in range(count))
    measured = trained[::stride]
    score = Score(Reference("direct", 1, 1), FitOutcome("warm", 0, True, ""), (), measured, measured)
    assert score.beside(trained) == measured
