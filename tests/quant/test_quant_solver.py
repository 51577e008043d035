"""Laws of the direct solver: never worse than rounding to nearest, exactly in the scheme, at rest where it stops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peelcli.errors import UsageError
from peelcli.quant.fake_quantize import dequantize, quantize
from peelcli.quant.initial_scale import initial_scale, start_scale
from peelcli.quant.schemes import SCHEMES
from peelcli.quant.solver import damped, least_squares_target, quadratic_loss, solve
from peelcli.records.quant_spec import QuantSpec

LOW_BIT = [name for name, scheme in SCHEMES.items() if not scheme.is_free]


def problem(d_out: int, d_in: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """A target (d_out, d_in), and the damped hessian of correlated inputs with a few outlying features."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * d_in + 3, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator)
    x[:, :: max(1, d_in // 3)] *= 5
    return torch.randn(d_out, d_in, generator=generator) * spread, damped(x.T @ x)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(LOW_BIT),
    st.integers(1, 9),
    st.sampled_from([1, 3, 17, 70]),
    st.sampled_from([None, 1, 16]),
    st.sampled_from([1e-6, 1.0, 1e4]),
    st.integers(0, 2**31),
)
def test_never_worse_than_round_to_nearest_in_any_row(name, d_out, d_in, group_size, spread, seed):
    scheme = SCHEMES[name]
    target, hessian = problem(d_out, d_in, seed, spread)
    codes, scale = solve(target, hessian, QuantSpec(scheme.name, group_size))
    assert codes.dtype == torch.int8
    assert torch.isin(codes, torch.tensor(scheme.codes, dtype=torch.int8)).all()
    nearest = initial_scale(target, QuantSpec(scheme.name, group_size))
    rounded = dequantize(
        quantize(target, nearest, QuantSpec(scheme.name, group_size)),
        nearest,
        QuantSpec(scheme.name, group_size),
    )
    own = quadratic_loss(dequantize(codes, scale, QuantSpec(scheme.name, group_size)), target, hessian)
    assert (own <= quadratic_loss(rounded, target, hessian) * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["binary", "ternary", "int2", "int3", "int4", "nf4"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_it_gains_much_over_rounding_and_more_than_feedback_alone(name, group_size):
    scheme = SCHEMES[name]
    target, hessian = problem(48, 96, 7)

    def left(codes: Tensor, scale: Tensor) -> float:
        return float(
            quadratic_loss(
                dequantize(codes, scale, QuantSpec(scheme.name, group_size)), target, hessian
            ).sum()
        )

    nearest = initial_scale(target, QuantSpec(scheme.name, group_size))
    rounded = left(quantize(target, nearest, QuantSpec(scheme.name, group_size)), nearest)
    fed_back = left(*solve(target, hessian, QuantSpec(scheme.name, group_size), starts=(1.0,), max_sweeps=0))
    solved = left(*solve(target, hessian, QuantSpec(scheme.name, group_size)))
    assert fed_back < 0.9 * rounded
    assert solved < 0.9 * fed_back


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(LOW_BIT), st.integers(1, 9), st.sampled_from([1, 17, 70]), st.integers(0, 2**31))
def test_with_one_step_for_the_matrix_the_whole_is_never_worse(name, d_out, d_in, seed):
    scheme = SCHEMES[name]
    target, hessian = problem(d_out, d_in, seed)
    nearest = start_scale(target, QuantSpec(scheme.name, granularity="tensor"))

    def left(codes: Tensor, scale: Tensor) -> float:
        assert scale.shape == (1, 1)
        return float(quadratic_loss(dequantize(codes, scale, QuantSpec(scheme.name)), target, hessian).sum())

    rounded = quantize(target, nearest, QuantSpec(scheme.name))
    losses = [left(rounded, nearest)]
    for sweeps in (0, 1, 2, 8):
        solved = solve(
            target, hessian, QuantSpec(scheme.name, granularity="tensor"), starts=(1.0,), max_sweeps=sweeps
        )
        losses.append(left(*solved))
    for earlier, later in zip(losses, losses[1:], strict=False):
        assert later <= earlier * (1 + 1e-4) + 1e-9
    known = solve(target, hessian, QuantSpec(scheme.name, granularity="tensor"), known=(rounded, nearest))
    assert left(*known) <= losses[-1] * (1 + 1e-4) + 1e-9


def test_more_sweeps_and_more_starts_never_hurt():
    target, hessian = problem(16, 64, 3)
    losses = []
    for sweeps in (0, 1, 2, 4, 8, 16):
        codes, scale = solve(target, hessian, QuantSpec("ternary"), starts=(1.0,), max_sweeps=sweeps)
        losses.append(quadratic_loss(codes * scale, target, hessian))
    for earlier, later in zip(losses, losses[1:], strict=False):
        assert (later <= earlier * (1 + 1e-5)).all()
    codes, scale = solve(target, hessian, QuantSpec("ternary"), starts=(1.0, 0.7, 1.4), max_sweeps=16)
    assert (quadratic_loss(codes * scale, target, hessian) <= losses[-1] * (1 + 1e-5)).all()
    assert losses[-1].sum() < losses[0].sum()


@pytest.mark.parametrize("name", ["binary", "ternary", "int2", "int4", "nf4"])
def test_a_weight_that_lies_in_the_scheme_is_found_again(name):
    scheme = SCHEMES[name]
    _, hessian = problem(8, 40, 11)
    generator = torch.Generator().manual_seed(5)
    levels = torch.tensor(scheme.levels, dtype=torch.float32)
    codes = levels[torch.randint(len(levels), (8, 40), generator=generator)]
    target = codes * (torch.rand(8, 1, generator=generator) + 0.1)
    torch.testing.assert_close(
        dequantize(*solve(target, hessian, QuantSpec(scheme.name)), QuantSpec(scheme.name)), target
    )


def test_the_target_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 12, generator=generator, dtype=torch.float64)
    wanted = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    target = least_squares_target(weight, x.T @ x, (wanted - x @ weight.T).T @ x)
    torch.testing.assert_close(target, torch.linalg.lstsq(x, wanted).solution.T)
    # What damping adds pulls towards the weight: however strong, nothing moves where nothing is missing.
    torch.testing.assert_close(
        least_squares_target(weight, damped(x.T @ x, 10.0), torch.zeros(5, 12)), weight
    )


def test_no_input_no_harm_and_what_cannot_be_solved_is_refused():
    codes, scale = solve(torch.eye(4), damped(torch.zeros(4, 4)), QuantSpec("ternary"))
    torch.testing.assert_close(codes * scale, torch.eye(4))
    with pytest.raises(UsageError, match="free"):
        solve(torch.eye(4), torch.eye(4), QuantSpec("fp"))
    with pytest.raises(UsageError, match=r"\(4, 4\).*found \(3, 3\)"):
        solve(torch.eye(4), torch.eye(3), QuantSpec("ternary"))
    with pytest.raises(UsageError, match="finite"):
        solve(torch.eye(4), torch.full((4, 4), torch.nan), QuantSpec("ternary"))
