"""Laws of fitting to states: never worse than the start, exactly in the scheme, repeatable, exact where it can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peelcli.quant.fake_quantize import fake_quantize
from peelcli.quant.initial_scale import initial_scale
from peelcli.quant.qparams import initial_qparams
from peelcli.quant.schemes import SCHEMES, scheme_named
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.interface import Batch, Budget, LinearMap
from peelcli.references.regression import fit_regression, fvu, sequence_order, step_sizes

N_SEQ, SEQ_LEN, WIDTH = 12, 8, 16


class Toy:
    """Data of a residual linear block y = x + x Wᵀ with W (WIDTH, WIDTH)."""

    def __init__(self, weight: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(N_SEQ, SEQ_LEN, WIDTH, generator=generator)
        self.targets = self.inputs + self.inputs @ weight.T

    def __len__(self) -> int:
        return N_SEQ

    def batch(self, rows: Sequence[int]) -> Batch:
        rows = list(rows)
        return Batch(torch.zeros(len(rows), SEQ_LEN, dtype=torch.long), self.inputs[rows], self.targets[rows])


def forward(hidden: Tensor, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    return hidden + hidden @ weights["w"].T


def budget(steps: int = 24, start: str = "warm") -> Budget:
    return Budget(steps, 0.05, 4, 3, start)


@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "fp"])
@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_never_worse_than_rounding_and_exactly_in_the_scheme(
    name: str, group_size: int | None, orthogonal: bool
) -> None:
    scheme = scheme_named(name)
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    fit, select = Toy(weight, 5), Toy(weight, 6)
    rounded = fake_quantize(
        weight, initial_scale(weight, QuantSpec(scheme.name, group_size)), QuantSpec(scheme.name, group_size)
    )
    about = replace(budget(), orthogonal=orthogonal)
    replacement, outcome = fit_regression(
        forward, [LinearMap("w", weight, False)], QuantSpec(scheme.name, group_size), fit, select, about
    )
    fitted = replacement.weights(weight)["w"]
    assert fvu(forward, {"w": fitted}, select, 4, 8) <= fvu(forward, {"w": rounded}, select, 4, 8) + 1e-7
    codes = replacement.quantized["w"].codes
    assert set(codes.unique().tolist()) <= set(scheme.codes)
    assert outcome.start == "warm"
    assert outcome.steps == 24


def test_fitting_gains_much_over_rounding_where_inputs_are_correlated() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, mixing = (
        torch.randn(WIDTH, WIDTH, generator=generator),
        torch.randn(WIDTH, WIDTH, generator=generator),
    )
    fit, select = Toy(weight, 5), Toy(weight, 6)
    for data in (fit, select):
        data.inputs = data.inputs @ mixing
        data.targets = data.inputs + data.inputs @ weight.T
    scheme = scheme_named("ternary")
    rounded = fake_quantize(weight, initial_scale(weight, QuantSpec(scheme.name)), QuantSpec(scheme.name))
    replacement, _ = fit_regression(
        forward, [LinearMap("w", weight, False)], QuantSpec(scheme.name), fit, select, budget(120)
    )
    assert fvu(forward, replacement.weights(weight), select, 4) < 0.8 * fvu(
        forward, {"w": rounded}, select, 4
    )


def test_a_few_orthogonal_steps_come_closer_where_all_inputs_have_much_in_common() -> None:
    errors = {}
    for seed in range(3):
        weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
        fit, select = Toy(weight, 5), Toy(weight, 6)
        for data in (fit, select):
            data.inputs[..., 0] += 5
            data.targets = data.inputs + data.inputs @ weight.T
        scheme = scheme_named("ternary")
        adam = Budget(20, 0.08, 4, seed, "warm", (0.5, 0.95), 0.5)  # the best that were found for it
        for name, about in (
            ("adam", adam),
            ("orthogonal", replace(adam, **step_sizes(scheme, "warm", closely=True))),
        ):
            replacement, _ = fit_regression(
                forward, [LinearMap("w", weight, False)], QuantSpec(scheme.name), fit, select, about
            )
            errors[name] = errors.get(name, 0) + fvu(forward, replacement.weights(weight), select, 4)
    assert errors["orthogonal"] < errors["adam"], errors


def test_transposed_storage_is_the_same_fit() -> None:
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4))
    fit, select, scheme = Toy(weight, 5), Toy(weight, 6), scheme_named("ternary")

    def forward_transposed(hidden: Tensor, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return hidden + hidden @ weights["w"]

    plain, _ = fit_regression(
        forward, [LinearMap("w", weight, False)], QuantSpec(scheme.name), fit, select, budget()
    )
    stored = weight.T.contiguous()
    turned, _ = fit_regression(
        forward_transposed, [LinearMap("w", stored, True)], QuantSpec(scheme.name), fit, select, budget()
    )
    torch.testing.assert_close(turned.weights(stored)["w"].T, plain.weights(weight)["w"])


def test_a_block_already_in_the_scheme_is_reproduced() -> None:
    scheme = scheme_named("ternary")
    raw = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4))
    weight = fake_quantize(raw, initial_scale(raw, QuantSpec(scheme.name)), QuantSpec(scheme.name))
    fit, select = Toy(weight, 5), Toy(weight, 6)
    replacement, outcome = fit_regression(
        forward, [LinearMap("w", weight, False)], QuantSpec(scheme.name), fit, select, budget()
    )
    assert fvu(forward, replacement.weights(weight), select, 4) < 1e-8
    assert outcome.converged


def test_fresh_start_forgets_the_trained_weights() -> None:
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4))
    fit, select, scheme = Toy(weight, 5), Toy(weight, 6), scheme_named("int8")
    maps = [LinearMap("w", weight, False)]
    warm, _ = fit_regression(forward, maps, QuantSpec(scheme.name), fit, select, budget(0, "warm"))
    fresh, _ = fit_regression(forward, maps, QuantSpec(scheme.name), fit, select, budget(0, "fresh"))
    assert fvu(forward, warm.weights(weight), select, 4) < 1e-3
    assert fvu(forward, fresh.weights(weight), select, 4) > 0.5


def test_same_seed_same_witness() -> None:
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4))
    runs = [
        fit_regression(
            forward,
            [LinearMap("w", weight, False)],
            QuantSpec("int2"),
            Toy(weight, 5),
            Toy(weight, 6),
            budget(),
        )[0]
        for _ in range(2)
    ]
    assert torch.equal(runs[0].quantized["w"].codes, runs[1].quantized["w"].codes)
    assert torch.equal(runs[0].quantized["w"].scale, runs[1].quantized["w"].scale)


def test_too_few_steps_are_called_unconverged() -> None:
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4))
    fit, select = Toy(weight, 5), Toy(weight, 6)
    maps = [LinearMap("w", weight, False)]
    _, outcome = fit_regression(forward, maps, QuantSpec("fp"), fit, select, budget(8, "fresh"))
    assert not outcome.converged
    assert "still gaining" in outcome.reason


def test_every_sequence_is_used_before_any_is_used_again() -> None:
    order = sequence_order(N_SEQ, budget(6))
    flat = [row for rows in order for row in rows]
    assert sorted(flat[:N_SEQ]) == list(range(N_SEQ))
    assert sorted(flat[N_SEQ : 2 * N_SEQ]) == list(range(N_SEQ))


SPECS = [
    *(
        QuantSpec("int4", None, granularity, scale)
        for granularity in ("tensor", "channel")
        for scale in ("absmean", "absmax", "mse")
    ),
    *(
        QuantSpec("int4", None, granularity, scale, symmetric=False)
        for granularity in ("tensor", "channel")
        for scale in ("absmax", "mse")
    ),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_steps_a_fit_is_the_rounding_that_was_asked_for(spec: QuantSpec) -> None:
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) + 0.5
    fit, maps = Toy(weight, 5), [LinearMap("w", weight, False)]
    replacement, _ = fit_regression(forward, maps, spec, fit, fit, budget(0))
    scale, zero = initial_qparams(weight, spec)
    assert torch.equal(replacement.weights(weight)["w"], fake_quantize(weight, scale, spec, zero))
    assert replacement.quantized["w"].spec.granularity == spec.granularity
    trained, _ = fit_regression(forward, maps, spec, fit, fit, budget(24))
    assert trained.quantized["w"].scale.shape == scale.shape
    errors = [fvu(forward, w.weights(weight), fit, 4, 8) for w in (trained, replacement)]
    assert errors[0] < errors[1] or (spec.scale != "absmean" and errors[0] == errors[1])
