"""Orthogonalised steps: the direction's factors are kept, none counts more than another, and sizes are as asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peelcli.references.muon import BLOCK_ROWS, Muon, orthogonalized

SIDES = st.integers(1, 24)


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(d_out=SIDES, d_in=SIDES, size=st.sampled_from((1e-12, 1.0, 1e12)), seed=st.integers(0, 99))
def test_singular_vectors_are_kept_and_their_weights_evened_out(d_out, d_in, size, seed):
    given_matrix = matrix(d_out, d_in, seed=seed)
    found = orthogonalized(given_matrix * size)
    assert float(found.square().mean().sqrt()) == pytest.approx(1, rel=1e-4)
    left, values, right = torch.linalg.svd(given_matrix, full_matrices=False)
    inside = left.T @ found @ right.T  # diagonal, in the basis of the matrix
    even = values > 0.05 * values[0]  # what four iterations can lift
    kept = inside.diagonal()[even]
    assert float((inside - inside.diagonal().diag()).abs().max()) < 1e-3 * float(inside.abs().max())
    assert float(kept.min()) > 0.4 * float(kept.max())


def test_a_stack_is_so_many_matrices_and_an_unused_one_stays():
    stack = torch.stack([matrix(6, 9, seed=1), torch.zeros(6, 9), matrix(6, 9, seed=2)])
    found = orthogonalized(stack)
    assert found[1].eq(0).all()
    for n in (0, 2):
        torch.testing.assert_close(found[n], orthogonalized(stack[n]), atol=1e-5, rtol=1e-5)


def test_of_many_rows_blocks_are_orthogonal_each_on_its_own():
    high = matrix(BLOCK_ROWS + 43, 7, seed=5)  # 150 rows and 149
    found = orthogonalized(high)
    assert found.shape == high.shape
    assert float(found.square().mean()) == pytest.approx(1, rel=1e-4)
    for rows in (slice(None, 150), slice(150, None)):
        alone = orthogonalized(high[rows])
        ratio = found[rows] / alone
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), atol=1e-3, rtol=1e-3)


def test_a_step_is_as_long_as_asked_and_goes_downhill_by_what_was_and_is():
    weight, idle = nn.Parameter(matrix(8, 5)), nn.Parameter(matrix(3, 3))
    steps = Muon([{"params": [weight, idle], "lr": 0.1}], momentum=0.5)
    first, second = matrix(8, 5, seed=3), matrix(8, 5, seed=4)
    for gradient, along in ((first, first), (second, 0.5 * first + second)):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        steps.step()
        torch.testing.assert_close(
            before - weight.detach(), 0.1 * orthogonalized(along), atol=1e-6, rtol=1e-4
        )
    assert torch.equal(idle.detach(), matrix(3, 3))


def test_gradients_may_be_made_by_a_closure_as_in_any_optimizer():
    weights = [nn.Parameter(matrix(8, 5)) for _ in range(2)]
    by_itself, asked = (Muon([{"params": [w], "lr": 0.1}], momentum=0.5) for w in weights)
    weights[0].grad = weights[0].detach().clone()

    def closure() -> float:
        loss = weights[1].square().sum() / 2
        loss.backward()
        return float(loss.detach())

    assert by_itself.step() is None
    assert asked.step(closure) == pytest.approx(float(matrix(8, 5).square().sum() / 2))
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], matrix(8, 5))
