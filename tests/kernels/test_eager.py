"""Laws of the eager kernels: descent never rises and ends where no single change helps, and rounding feeds back."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peelcli.quant.kernels.eager import (
    coordinate_descent_,
    gradient_of,
    rescale_,
    round_with_feedback,
    upper_factor,
    weight_of,
)

LEVELS = {
    "binary": (-1.0, 1.0),
    "ternary": (-1.0, 0.0, 1.0),
    "int2": (-2.0, -1.0, 0.0, 1.0),
    "int4": tuple(float(n) for n in range(-8, 8)),
    "uneven": (-1.0, -0.5, -0.2, 0.0, 0.1, 0.4, 1.0),
}


class Problem(NamedTuple):
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    target: Tensor
    hessian: Tensor
    levels: Tensor
    group_of: Tensor


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Correlated inputs, any levels and grouping, shapes that fill no block, some of one column or one row."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    d_out, d_in = draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 5, 63, 64, 65, 130]))
    n_groups = draw(st.integers(1, min(4, d_in)))
    levels = torch.tensor(LEVELS[draw(st.sampled_from(sorted(LEVELS)))], dtype=torch.float64)
    mix = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    x = torch.randn(draw(st.sampled_from([3, 200])), d_in, generator=generator, dtype=torch.float64) @ mix
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(d_in, dtype=torch.float64)
    codes = levels[torch.randint(len(levels), (d_out, d_in), generator=generator)]
    scale = torch.rand(d_out, n_groups, generator=generator, dtype=torch.float64) - draw(
        st.sampled_from([0.0, 0.5])
    )
    shift = torch.rand(d_out, n_groups, generator=generator, dtype=torch.float64)
    group_of = torch.randperm(d_in, generator=generator) % n_groups
    target = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    zero_point = shift if draw(st.booleans()) else None
    return Problem(codes, scale, zero_point, target, hessian, levels, group_of)


def loss(p: Problem, codes: Tensor | None = None) -> Tensor:
    """f of each row (d_out,), from its definition."""
    error = weight_of(p.codes if codes is None else codes, p.scale, p.zero_point, p.group_of) - p.target
    return torch.einsum("ri,ij,rj->r", error, p.hessian, error)


def gradient(p: Problem) -> Tensor:
    return gradient_of(p.codes, p.scale, p.zero_point, p.target, p.hessian, p.group_of)


def sweep_(p: Problem) -> Tensor:
    kept = gradient(p)
    changed = coordinate_descent_(p.codes, p.scale, kept, p.hessian, p.levels, p.group_of)
    torch.testing.assert_close(kept, gradient(p))
    return changed


def rescale_all_(p: Problem) -> None:
    kept = gradient(p)
    rescale_(p.codes, p.scale, p.zero_point, kept, p.hessian, p.group_of)
    torch.testing.assert_close(kept, gradient(p))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_no_sweep_and_no_rescaling_raises_the_loss_of_a_row(p: Problem) -> None:
    before = loss(p)
    for _ in range(3):
        old = p.codes.clone()
        changed = sweep_(p)
        assert torch.equal(changed, (p.codes != old).sum(-1))
        after = loss(p)
        assert (after <= before * (1 + 1e-9)).all()
        assert (after < before)[changed > 0].all()
        rescale_all_(p)
        before = loss(p)
        assert (before <= after * (1 + 1e-9)).all()
        assert torch.isin(p.codes, p.levels).all()


@settings(max_examples=15, deadline=None)
@given(problems())
def test_where_no_code_moves_no_single_change_of_a_code_helps(p: Problem) -> None:
    for _ in range(200):
        if not sweep_(p).any():
            break
    settled = loss(p)
    for column in range(p.codes.shape[1]):
        for level in p.levels:
            other = p.codes.clone()
            other[:, column] = level
            assert (loss(p, other) >= settled * (1 - 1e-9)).all()


@settings(max_examples=15, deadline=None)
@given(problems())
def test_a_scale_alone_in_its_row_is_the_best_there_is(p: Problem) -> None:
    p = p._replace(scale=p.scale[:, :1].clone(), zero_point=None, group_of=torch.zeros_like(p.group_of))
    rescale_all_(p)
    best = loss(p)
    for factor in (0.5, 0.9, 0.999, 1.001, 1.1, -1.0):
        assert (loss(p._replace(scale=p.scale * factor)) >= best * (1 - 1e-9)).all()


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_rounding_without_correlation_is_rounding_to_nearest(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5, 70, generator=generator)
    levels = torch.tensor(LEVELS[name])
    scale = torch.full((5, 1), 0.4)
    group_of = torch.zeros(70, dtype=torch.int64)
    hessian = torch.diag(torch.rand(70, generator=generator) + 0.1)
    codes = round_with_feedback(scale, None, target, upper_factor(hessian), levels, group_of)
    distance = (target.unsqueeze(-1) / 0.4 - levels).abs()
    assert torch.equal(codes, levels[distance.argmin(-1)])


def test_feedback_pays_where_inputs_are_correlated() -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)).double()
    hessian = x.T @ x / len(x)
    target = torch.randn(32, 96, generator=generator).double()
    scale, group_of = torch.full((32, 1), 0.8, dtype=torch.float64), torch.zeros(96, dtype=torch.int64)
    levels = torch.tensor(LEVELS["int2"], dtype=torch.float64)

    def left(codes: Tensor) -> float:
        return float(loss(Problem(codes, scale, None, target, hessian, levels, group_of)).sum())

    plain = left((target / 0.8).round().clamp(-2, 1))
    fed_back = round_with_feedback(scale, None, target, upper_factor(hessian), levels, group_of)
    assert left(fed_back) < 0.85 * plain
    sweep_(Problem(fed_back, scale, None, target, hessian, levels, group_of))
    assert left(fed_back) < 0.6 * plain


def test_rounding_with_feedback_is_gptq() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 70, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(70, 70, generator=generator, dtype=torch.float64)
    hessian = x.T @ x / len(x)
    target = torch.randn(6, 70, generator=generator, dtype=torch.float64)
    levels, group_of = torch.tensor(LEVELS["int4"], dtype=torch.float64), torch.zeros(70, dtype=torch.int64)
    scale = torch.full((6, 1), 0.3, dtype=torch.float64)
    codes = round_with_feedback(scale, None, target, upper_factor(hessian), levels, group_of)
    # The paper's own form (algorithm 1): errors are spread by the Cholesky factor of the inverse.
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left = target.clone()
    for j in range(70):
        expected = (left[:, j] / 0.3).round().clamp(-8, 7)
        assert torch.equal(codes[:, j], expected)
        left[:, j:] -= ((left[:, j] - 0.3 * expected) / factor[j, j]).outer(factor[j, j:])
    upper = upper_factor(hessian)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper @ upper.T, hessian)


def test_a_scale_of_zero_and_a_column_without_curvature_change_nothing() -> None:
    codes = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    levels, group_of = torch.tensor([-1.0, 0.0, 1.0]), torch.zeros(2, dtype=torch.int64)
    target = torch.tensor([[3.0, 3.0], [-3.0, 3.0]])
    scale, hessian = torch.tensor([[0.0], [1.0]]), torch.diag(torch.tensor([1.0, 0.0]))
    changed = sweep_(Problem(codes, scale, None, target, hessian, levels, group_of))
    assert changed.tolist() == [0, 1]
    assert codes.tolist() == [[1.0, -1.0], [-1.0, -1.0]]
