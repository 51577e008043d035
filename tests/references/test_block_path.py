"""The block of a path: which matrices are solved, and that solving never does harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peelcli.quant.grid import recognise_grid
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.interface import Batch, Budget, LinearMap
from peelcli.references.peeled_block import BlockStarts, fit_block, residual_maps, start_weights

D, WIDE, N, LEN = 8, 12, 12, 6


class Toy:
    """A block with two residual updates: x + tanh(x A) Bᵀ, then the same again with C and E."""

    def __init__(self, seed: int, scale: float = 0.3) -> None:
        g = torch.Generator().manual_seed(seed)
        shapes = {"a": (WIDE, D), "b": (D, WIDE), "c": (WIDE, D), "e": (D, WIDE)}
        self.maps = [
            LinearMap(name, torch.randn(shape, generator=g) * scale, False) for name, shape in shapes.items()
        ]

    def features(
        self, hidden: Tensor, ids: Tensor, weights: Mapping[str, Tensor], name: str
    ) -> tuple[Tensor, Tensor]:
        w = {m.name: m.weight for m in self.maps} | dict(weights)
        first = torch.tanh(hidden @ w["a"].T)
        middle = hidden + first @ w["b"].T
        second = torch.tanh(middle @ w["c"].T)
        seen = {"a": hidden, "b": first, "c": middle, "e": second}
        return middle + second @ w["e"].T, seen[name]

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return self.features(hidden, ids, weights, "a")[0]


class Rows:
    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, rows: Sequence[int]) -> Batch:
        at = list(rows)
        return Batch(torch.zeros(len(at), LEN, dtype=torch.long), self.inputs[at], self.targets[at])


def data(seed: int) -> Rows:
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(N, LEN, D, generator=g)
    mixed = inputs @ (torch.eye(D) + 0.4 * torch.randn(D, D, generator=g))
    return Rows(inputs, mixed + 0.3 * torch.sin(3 * mixed) + 0.1 * torch.randn(N, LEN, D, generator=g))


def error(block: Toy, weights: Mapping[str, Tensor], rows: Rows) -> float:
    batch = rows.batch(range(N))
    return float((block(batch.inputs, batch.ids, weights) - batch.targets).square().sum())


def starts(block: Toy) -> BlockStarts:
    ids = torch.zeros(N, LEN, dtype=torch.long)
    found = residual_maps(block, data(0).inputs, ids)
    return BlockStarts(found, start_weights(block.maps, "warm", 0), 5)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["self_attn.o_proj.weight", "mlp.down_proj.weight"]),
        ("gpt2", ["attn.c_proj.weight", "mlp.c_proj.weight"]),
        ("phi", ["self_attn.dense.weight", "mlp.fc2.weight"]),
        ("opt", ["self_attn.out_proj.weight", "fc2.weight"]),
        ("gemma2", []),  # it normalises what each sublayer adds
        ("mixtral", []),  # experts are chosen by a router
    ],
)
def test_residual_maps_are_those_that_add_to_the_stream(family, expected, save_model, tmp_path):
    from peelcli.checkpoint.model import BlockwiseModel
    from peelcli.fitting.block import ModelBlock

    model = BlockwiseModel(save_model(family), dtype=torch.float32, device="cpu", offload_dir=tmp_path / "o")
    ids = torch.arange(20).view(2, 10) + 3
    with model.block(2) as module:
        found = residual_maps(ModelBlock(model, 2, module), model.prepare(ids).hidden, ids)
    assert [m.name for m in found] == expected


def test_a_matrix_of_zeros_is_told_by_its_place_not_its_effect():
    block = Toy(0)
    block.maps = [LinearMap(m.name, torch.zeros_like(m.weight), False) for m in block.maps]
    found = residual_maps(block, data(0).inputs, torch.zeros(N, LEN, dtype=torch.long))
    assert [m.name for m in found] == ["b", "e"]


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 0.1, 1.0]))
@settings(max_examples=25, deadline=None)
def test_solved_from_nothing_a_block_is_never_worse_than_passing_on(seed, scale):
    block, rows = Toy(seed, scale), data(seed)
    passed_on = float((rows.inputs - rows.targets).square().sum())
    *_, solved = starts(block).candidates(block, rows, rows)
    assert error(block, solved, rows) <= passed_on * (1 + 1e-6)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_last_matrix_solved_is_never_worse_than_it_was_and_better_with_less_ridge(seed):
    block, rows = Toy(seed), data(seed)
    before, last, _ = starts(block).candidates(block, rows, rows)
    assert error(block, last, rows) <= error(block, before, rows) * (1 + 1e-6)
    assert all(torch.equal(last[name], before[name]) for name in ("a", "b", "c"))


def test_a_solved_matrix_is_the_least_squares_solution():
    block, rows = Toy(3), data(3)
    _, last, _ = starts(block).candidates(block, rows, rows)
    batch = rows.batch(range(N))
    out, x = block.features(batch.inputs, batch.ids, {"e": torch.zeros(D, WIDE)}, "e")
    exact = torch.linalg.lstsq(x.reshape(-1, WIDE), (batch.targets - out).reshape(-1, D)).solution.T
    assert error(block, last, rows) == pytest.approx(error(block, {"e": exact}, rows), rel=1e-3)


def test_starts_shared_by_two_targets_are_those_computed_alone():
    block, one, other = Toy(1), data(1), data(1)
    other.targets = -other.targets
    shared = starts(block)
    list(shared.candidates(block, one, one))
    for mine, alone in zip(
        shared.candidates(block, other, other), starts(block).candidates(block, other, other), strict=True
    ):
        assert all(torch.allclose(mine[name], alone[name], atol=1e-6) for name in mine)


@pytest.mark.parametrize("scheme", ["fp", "ternary", "binary", "int4"])
def test_a_fit_is_in_its_scheme_and_no_worse_than_the_weights_as_they_are(scheme):
    block, rows = Toy(5), data(5)
    budget = Budget(8, 0.03, 4, 0, "warm")
    replacement, outcome = fit_block(block, starts(block), QuantSpec(scheme), rows, rows, budget)
    weights = replacement.weights(torch.empty(0))
    plain = {m.name: m.weight for m in block.maps}
    if scheme != "fp":
        from peelcli.references.peeled_block import _in_scheme

        plain = {m.name: _in_scheme(m, m.weight, QuantSpec(scheme)) for m in block.maps}
        assert all(recognise_grid(w) is not None for w in weights.values())
    assert error(block, weights, rows) <= error(block, plain, rows) * (1 + 1e-6)
    assert outcome.steps == 8


def test_a_target_that_is_reached_already_is_left_alone():
    block, rows = Toy(6), data(6)
    rows.targets = block(rows.inputs, torch.zeros(N, LEN, dtype=torch.long), {})
    replacement, outcome = fit_block(
        block, starts(block), QuantSpec("fp"), rows, rows, Budget(8, 0.03, 4, 0, "warm")
    )
    assert outcome.steps == 0
    assert all(torch.equal(replacement.plain[m.name], m.weight) for m in block.maps)


def test_fresh_weights_are_random_of_the_same_spread():
    maps = [LinearMap("w", torch.randn(64, 64) * 3, False)]
    one, same, other = (start_weights(maps, "fresh", seed)["w"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float(one.std()) == pytest.approx(3, rel=0.1)
