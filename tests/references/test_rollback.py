"""Laws of the rollback: one for each block that an earlier checkpoint really has, in the layer's own bits."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from peelcli.records import KINDS, Reference
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.catalogue import references_of
from peelcli.references.plan import Origin, Plan
from peelcli.references.rollback import roll_back

PLAN = Plan(
    num_layers=3,
    layers=(1, 2, 3),
    kinds=("rollback",),
    spec=QuantSpec("ternary"),
    sublayers=frozenset({1, 2, 3}),
    layer_bits={1: 32.0, 2: 1.58, 3: 16.0},
    layer_hashes={1: "a-now", 2: "b-now", 3: "c-now"},
    origins=(
        Origin("0" * 12, 100, {1: "a-100", 2: "b-100", 3: "c-100"}),
        Origin("1" * 12, 200, {1: "a-200", 2: "b-200", 3: "c-200"}),
    ),
)


def steps(layer: int, plan: Plan) -> list[int | None]:
    return [r.origin_step for r in references_of(layer, plan)]


def with_origins(*origins: Origin) -> Plan:
    return replace(PLAN, origins=origins)


def test_one_for_each_earlier_checkpoint_in_the_layers_own_bits() -> None:
    for layer, bits in PLAN.layer_bits.items():
        found = references_of(layer, PLAN)
        assert [(r.kind, r.layer, r.target, r.sublayer, r.scheme) for r in found] == [
            ("rollback", layer, layer, None, None)
        ] * 2
        assert [(r.origin_step, r.origin_id) for r in found] == [(200, "1" * 12), (100, "0" * 12)]
        assert {r.bits for r in found} == {bits}
        assert len({r.key for r in found}) == 2
        assert all(r.key.endswith(r.origin_id) and "/" not in r.key for r in found if r.origin_id)


def test_without_earlier_checkpoints_there_are_none() -> None:
    assert references_of(1, with_origins()) == ()


def test_a_block_that_is_the_layer_itself_is_none() -> None:
    older = replace(PLAN.origins[1], layer_hashes={1: "a-200", 2: "b-now", 3: "c-200"})
    plan = with_origins(PLAN.origins[0], older)
    assert [steps(layer, plan) for layer in (1, 2, 3)] == [[200, 100], [100], [200, 100]]


def test_a_block_that_two_earlier_checkpoints_share_is_tried_once_as_of_the_newer() -> None:
    older = replace(PLAN.origins[0], layer_hashes={1: "a-200", 2: "b-100", 3: "c-200"})
    plan = with_origins(older, PLAN.origins[1])
    assert [steps(layer, plan) for layer in (1, 2, 3)] == [[200], [200, 100], [200]]


def test_a_block_at_another_place_is_another_reference() -> None:
    """Layer 1 now is layer 2 of before: put where it was, that block is not the layer itself."""
    older = Origin("2" * 12, 300, {1: "a-300", 2: "a-now", 3: "c-300"})
    assert steps(2, with_origins(older)) == [300]


def test_where_layers_could_not_be_told_apart_all_are_tried() -> None:
    plan = with_origins(Origin("3" * 12, None), Origin("4" * 12, None))
    assert [r.origin_id for r in references_of(1, plan)] == ["4" * 12, "3" * 12]
    assert [r.origin_id for r in references_of(1, replace(plan, layer_hashes={}))] == ["4" * 12, "3" * 12]


def test_a_block_that_is_not_finite_is_none() -> None:
    plan = with_origins(PLAN.origins[0], replace(PLAN.origins[1], non_finite=frozenset({2})))
    assert [steps(layer, plan) for layer in (1, 2, 3)] == [[200, 100], [100], [200, 100]]


def test_the_witness_is_the_block_as_it_was() -> None:
    block = {"w": torch.randn(3, 4), "norm": torch.ones(4)}
    replacement, outcome = roll_back(block)
    put = replacement.weights(torch.empty(0))
    assert put.keys() == block.keys()
    assert all(torch.equal(put[name], block[name]) for name in block)
    assert (outcome.start, outcome.steps, outcome.converged) == ("earlier", 0, True)


def test_keys_are_unique_and_those_of_other_kinds_are_as_they_were() -> None:
    assert "rollback" in KINDS
    assert Reference("identity", 3, 3, "attention").key == "identity-003-attention"
    assert Reference("span", 4, 5, None, "int4", 128, 2.0).key == "span-004to005-block-int4"
    assert Reference("challenge", 2, 2, None, None, None, 32.0).key == "challenge-002-block"
    origins = [Reference("rollback", 7, 7, origin_id=f"{n:012x}", origin_step=5) for n in range(3)]
    assert origins[1].key == "rollback-007-block-000000000001"
    assert len({r.key for r in origins}) == 3


def test_references_written_before_there_were_rollbacks_are_read() -> None:
    old = asdict(Reference("direct", 1, 1, "mlp", "ternary", None, 1.58))
    del old["origin_id"], old["origin_step"]
    assert Reference(**old) == Reference("direct", 1, 1, "mlp", "ternary", None, 1.58)
