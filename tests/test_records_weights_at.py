"""What a layer runs with while a reference is in place: the one answer for the sweep, the replay and the graft."""

from __future__ import annotations

import pytest

from peelcli.records import Dropped, LayerWeights, Other, Reference, Stored, Trained

DROP = Dropped(("attention", "mlp"))


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (Reference("identity", 2, 2), [Trained(), DROP, Trained(), Trained()]),
        (Reference("identity", 2, 4), [Trained(), DROP, DROP, DROP]),
        (Reference("identity", 2, 2, "mlp"), [Trained(), Dropped(("mlp",)), Trained(), Trained()]),
        (Reference("exchange", 2, 3), [Trained(), Other(3), Other(2), Trained()]),
        (Reference("exchange", 1, 4), [Other(4), Trained(), Trained(), Other(1)]),
        (Reference("span", 2, 3, scheme="ternary"), [Trained(), Stored(), DROP, Trained()]),
        (Reference("direct", 2, 2, "attention", "ternary"), [Trained(), Stored(), Trained(), Trained()]),
        (Reference("rollback", 2, 2), [Trained(), Stored(), Trained(), Trained()]),
    ],
    ids=lambda value: value.key if isinstance(value, Reference) else "",
)
def test_each_layer_runs_with_what_the_reference_puts_there(
    reference: Reference, expected: list[LayerWeights]
) -> None:
    assert [reference.weights_at(layer) for layer in range(1, 5)] == expected


def test_only_a_whole_block_dropped_leaves_nothing() -> None:
    assert DROP.is_block
    assert not Dropped(("mlp",)).is_block
