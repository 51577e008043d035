"""A batch divided among threads gives the gradients of the whole batch, the same whatever the number of threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from peelcli.references.micro_batches import add_gradients

X = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def loss(weights: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
    return (X[list(rows)] @ weights["w"]).tanh().square().sum()


def gradients(*, at_once: bool, threads: int = 1) -> tuple[float, Tensor]:
    """Of what lies behind the weight: it is the square of a latent one."""
    torch.set_num_threads(threads)
    latent = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
    unused = torch.ones(2, requires_grad=True)
    weights = {"w": latent.square(), "unused": unused}
    value = add_gradients(loss, weights, range(len(X)), at_once=at_once)
    assert unused.grad is None
    assert latent.grad is not None
    return value, latent.grad


def test_shards_add_up_to_the_whole_batch():
    latent = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
    plain = loss({"w": latent.square()}, range(len(X)))
    plain.backward()
    for at_once in (True, False):
        value, grad = gradients(at_once=at_once)
        assert value == pytest.approx(float(plain.detach()), rel=1e-5)
        torch.testing.assert_close(grad, latent.grad, rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_changes_nothing():
    alone, shared = gradients(at_once=True, threads=1), gradients(at_once=True, threads=3)
    assert alone[0] == shared[0]
    assert torch.equal(alone[1], shared[1])
