"""What finishes a fit: it never does harm, it solves what is quadratic, and it reads real blocks rightly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from peelcli.fitting.block import ModelBlock
from peelcli.quant.schemes import SCHEMES, scheme_named
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.interface import Batch, Budget, LinearMap
from peelcli.references.peeled_block import residual_maps
from peelcli.references.refine import Refinement
from peelcli.references.regression import fit_regression, fvu

N_SEQ, SEQ_LEN, WIDTH = 12, 16, 24


class Linear:
    """A residual linear block y = x + x Wᵀ on correlated inputs, with its data."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7)) / WIDTH**0.5
        self.weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(8))
        self.inputs = torch.randn(N_SEQ, SEQ_LEN, WIDTH, generator=generator) @ mix
        self.maps = [LinearMap("w", self.weight, False)]

    def __len__(self) -> int:
        return N_SEQ

    def batch(self, rows: Sequence[int]) -> Batch:
        rows = list(rows)
        x = self.inputs[rows]
        return Batch(torch.zeros(len(rows), SEQ_LEN, dtype=torch.long), x, x + x @ self.weight.T)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return hidden + hidden @ weights["w"].T

    def pull(
        self, hidden: Tensor, ids: Tensor, targets: Tensor, weights: Mapping[str, Tensor], name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        change = (targets - self(hidden, ids, weights)).flatten(0, 1)
        return hidden.flatten(0, 1), change, torch.ones_like(change)


class Trained:
    """What a real block makes of random states."""

    def __init__(self, block: ModelBlock, width: int) -> None:
        self.block = block
        self.ids = torch.randint(3, 40, (N_SEQ, SEQ_LEN), generator=torch.Generator().manual_seed(1))
        self.inputs = torch.randn(N_SEQ, SEQ_LEN, width, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            self.targets = block(self.inputs, self.ids, {})

    def __len__(self) -> int:
        return N_SEQ

    def batch(self, rows: Sequence[int]) -> Batch:
        rows = list(rows)
        return Batch(self.ids[rows], self.inputs[rows], self.targets[rows])


SCHEMES_WITH_AND_WITHOUT = [
    *((n, True) for n in SCHEMES if n != "fp"),
    *((n, False) for n in SCHEMES if n.startswith("int")),
]


@pytest.mark.parametrize(("group_size", "granularity"), [(None, "tensor"), (None, "channel"), (7, "group")])
@pytest.mark.parametrize(("name", "symmetric"), SCHEMES_WITH_AND_WITHOUT)
def test_a_finished_fit_is_in_the_scheme_and_never_worse(name, symmetric, group_size, granularity):
    block, select, scheme = Linear(1), Linear(2), scheme_named(name)
    finish = Refinement(block, block.maps, block, 4)
    budget = Budget(4, 0.06, 4, 0, "warm")
    errors = []
    for end in (None, finish):
        spec = QuantSpec(name, group_size, granularity, symmetric=symmetric)
        replacement, _ = fit_regression(block, block.maps, spec, block, select, budget, end)
        assert (replacement.quantized["w"].zero_point is None) == symmetric
        assert replacement.quantized["w"].spec.granularity == granularity
        codes = replacement.quantized["w"].codes
        assert torch.isin(codes, torch.tensor(scheme.codes, dtype=torch.int8)).all()
        errors.append(fvu(block, replacement.weights(block.weight), select, 4, 8))
    assert errors[1] <= errors[0]
    if scheme.num_bits <= 4:
        assert errors[1] < 0.9 * errors[0]


def test_what_measures_worse_is_refused():
    block = Linear(1)
    replacement, _ = fit_regression(
        block, block.maps, QuantSpec("ternary"), block, block, Budget(0, 0.06, 4, 0, "warm")
    )
    kept, error = Refinement(block, block.maps, block, 4)(replacement, 0.5, lambda _: 0.6)
    assert kept is replacement
    assert error == 0.5
    assert Refinement(block, (), block, 4)(replacement, 0.5, lambda _: 0.1) == (replacement, 0.5)


def test_more_rounds_only_help(save_model, tmp_path):
    from peelcli.checkpoint.model import BlockwiseModel

    model = BlockwiseModel(save_model("llama"), dtype=torch.float32, device="cpu", offload_dir=tmp_path / "o")
    with model.block(2) as module:
        block = Trained(
            ModelBlock(model, 2, module), model.prepare(torch.arange(4).view(1, 4)).hidden.shape[-1]
        )
        few = block.batch(range(2))
        residual = residual_maps(block.block, few.inputs, few.ids)
        start, _ = fit_regression(
            block.block,
            block.block.maps,
            QuantSpec("ternary"),
            block,
            block,
            Budget(0, 0.06, 4, 0, "warm"),
        )
        errors = []
        for rounds in (0, 1, 2):
            finish = Refinement(block.block, residual, block, 4, rounds=rounds)

            def measured(replacement):
                return fvu(block.block, replacement.weights(residual[0].weight), block, 4)

            errors.append(finish(start, measured(start), measured)[1])
    assert errors[2] <= errors[1] < errors[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_real_block_tells_what_its_error_asks_of_a_matrix(family, save_model, tmp_path):
    from peelcli.checkpoint.model import BlockwiseModel

    model = BlockwiseModel(save_model(family), dtype=torch.float32, device="cpu", offload_dir=tmp_path / "o")
    ids = torch.arange(20).view(2, 10) + 3
    hidden = model.prepare(ids).hidden
    with model.block(2) as module:
        block = ModelBlock(model, 2, module)
        first, last = residual_maps(block, hidden, ids)
        generator = torch.Generator().manual_seed(0)
        targets = hidden + torch.randn(hidden.shape, generator=generator)
        out, x = block.features(hidden, ids, {}, last.name)
        seen, change, probe = block.pull(hidden, ids, targets, {}, last.name)
        torch.testing.assert_close(seen, x.flatten(0, 1))
        torch.testing.assert_close(change, (targets - out).flatten(0, 1))
        assert (probe.abs() == 1).all()

        seen, change, _ = block.pull(hidden, ids, targets, {}, first.name)
        weight = first.weight.clone().requires_grad_()
        error = (block(hidden, ids, {first.name: weight}) - targets).square().sum() / 2
        (slope,) = torch.autograd.grad(error, weight)
        moment = change.T @ seen
        torch.testing.assert_close(-slope, moment.T if first.transposed else moment, rtol=1e-3, atol=1e-4)
