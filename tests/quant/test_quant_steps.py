"""Zero points: whole codes, members and slopes as without them, a solver that keeps them, and a start that pays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peelcli.errors import UsageError
from peelcli.quant.fake_quantize import dequantize, fake_quantize, quantize
from peelcli.quant.groups import expand_scale
from peelcli.quant.initial_scale import start_scale
from peelcli.quant.qparams import initial_qparams
from peelcli.quant.schemes import SCHEMES
from peelcli.quant.solver import damped, quadratic_loss, solve
from peelcli.records.quant_spec import QuantSpec

INTEGERS = [name for name in SCHEMES if name.startswith("int")]
shared = st.sampled_from([(None, "tensor"), (None, "channel"), (5, "group")])


def skewed(shape: tuple[int, ...], seed: int, shift: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift


def squared(weight: Tensor, scale: Tensor, zero: Tensor | None, name: str, size: int | None) -> float:
    codes = quantize(weight, scale, QuantSpec(name, size), zero)
    return float((dequantize(codes, scale, QuantSpec(name, size), zero_point=zero) - weight).square().sum())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(INTEGERS),
    shared,
    st.sampled_from(["absmax", "mse"]),
    st.sampled_from([(3, 13), (2, 3, 8), (1, 1)]),
    st.sampled_from([0.0, 1.0, -5.0]),
    st.integers(0, 2**31),
)
def test_what_is_rounded_is_a_member_and_stays_what_it_is(name, how, rule, shape, shift, seed):
    scheme, (size, granularity) = SCHEMES[name], how
    weight = skewed(shape, seed, shift)
    scale, zero = initial_qparams(
        weight, QuantSpec(scheme.name, size, granularity=granularity, scale=rule, symmetric=False)
    )
    assert zero is not None
    assert torch.equal(zero, zero.round().clamp(scheme.qmin, scheme.qmax))
    codes = quantize(weight, scale, QuantSpec(scheme.name, size), zero)
    assert codes.dtype == torch.int8
    assert torch.isin(codes, torch.tensor(scheme.codes, dtype=torch.int8)).all()
    once = dequantize(codes, scale, QuantSpec(scheme.name, size), zero_point=zero)
    assert torch.equal(fake_quantize(weight, scale, QuantSpec(scheme.name, size), zero), once)
    assert torch.equal(quantize(once, scale, QuantSpec(scheme.name, size), zero), codes)
    step = expand_scale(scale, weight.shape, QuantSpec(name, size))
    members = (
        torch.tensor(scheme.levels) - expand_scale(zero, weight.shape, QuantSpec(name, size)).unsqueeze(-1)
    ) * step.unsqueeze(-1)
    nearest = (weight.unsqueeze(-1) - members).abs().amin(-1)
    torch.testing.assert_close((weight - once).abs(), nearest, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(INTEGERS), shared, st.sampled_from([0.0, 1.0]), st.integers(0, 2**31))
def test_the_least_squared_error_is_no_worse_than_without_zero_points_or_by_the_range(name, how, shift, seed):
    scheme, (size, granularity) = SCHEMES[name], how
    weight = skewed((4, 12), seed, shift)
    own = squared(
        weight,
        *initial_qparams(
            weight, QuantSpec(scheme.name, size, granularity=granularity, scale="mse", symmetric=False)
        ),
        name,
        size,
    )
    ranged = initial_qparams(
        weight, QuantSpec(scheme.name, size, granularity=granularity, scale="absmax", symmetric=False)
    )
    assert own <= squared(weight, *ranged, name, size) * (1 + 1e-5) + 1e-9
    assert (
        own
        <= squared(
            weight,
            start_scale(weight, QuantSpec(scheme.name, size, granularity=granularity)),
            None,
            name,
            size,
        )
        * (1 + 1e-5)
        + 1e-9
    )


def test_weights_to_one_side_of_zero_take_half_the_step():
    weight = skewed((16, 200), 0).abs()
    scale, zero = initial_qparams(weight, QuantSpec("int4", symmetric=False))
    own = squared(weight, scale, zero, "int4", None)
    assert own < 0.5 * squared(weight, start_scale(weight, QuantSpec("int4")), None, "int4", None)


def test_slopes_are_those_of_the_shifted_levels():
    weight = torch.tensor([[-0.4, 0.9, 3.3, 3.7, -1.0]], requires_grad=True)
    scale = torch.tensor([[1.0]], requires_grad=True)
    out = fake_quantize(weight, scale, QuantSpec("int2"), torch.tensor([[-2.0]]))  # 0, 1, 2, 3
    assert out.tolist() == [[0, 1, 3, 3, 0]]
    out.sum().backward()
    assert weight.grad.tolist() == [[1, 1, 1, 0, 0]]
    torch.testing.assert_close(scale.grad, torch.tensor([[0.4 + 0.1 - 0.3 + 3.0 + 0.0]]))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(INTEGERS), shared, st.sampled_from([1, 17, 70]), st.integers(0, 2**31))
def test_the_solver_keeps_zero_points_and_is_never_worse(name, how, d_in, seed):
    scheme, (size, granularity) = SCHEMES[name], how
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * d_in + 3, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator)
    hessian, target = damped(x.T @ x), skewed((5, d_in), seed)
    spec = QuantSpec(scheme.name, size, granularity, "absmax", symmetric=False)
    scale, zero = initial_qparams(target, spec)
    assert zero is not None

    def left(codes: Tensor, steps: Tensor) -> Tensor:
        value = dequantize(codes, steps, QuantSpec(scheme.name, size), zero_point=zero)
        loss = quadratic_loss(value, target, hessian)
        return loss.sum() if granularity == "tensor" else loss

    rounded = quantize(target, scale, QuantSpec(scheme.name, size), zero)
    losses = [left(rounded, scale)]
    for sweeps in (0, 2, 8):
        how_far = {"starts": (1.0,), "max_sweeps": sweeps}
        codes, found = solve(target, hessian, spec, known=(rounded, scale), qparams=(scale, zero), **how_far)
        assert torch.isin(codes, torch.tensor(scheme.codes, dtype=torch.int8)).all()
        assert found.shape == scale.shape
        losses.append(left(codes, found))
    for earlier, later in zip(losses, losses[1:], strict=False):
        assert (later <= earlier * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize(("name", "rule"), [("ternary", "mse"), ("nf4", "mse"), ("int4", "absmean")])
def test_zero_points_belong_to_integers(name, rule):
    with pytest.raises(UsageError, match=f"{name} and {rule}"):
        initial_qparams(torch.randn(3, 4), QuantSpec(name, scale=rule, symmetric=False))
