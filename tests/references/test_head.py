"""The light head: a head of the same class, never worse on `select` than what it starts from."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from peelcli.references.head import fit_head
from peelcli.references.interface import Budget

D, VOCAB, LEN = 6, 11, 9


class Features:
    """States whose next tokens depend on them linearly, and a head that does not know how."""

    def __init__(self, seed: int, count: int = 12) -> None:
        g = torch.Generator().manual_seed(seed)
        rule = torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(99))
        self.matrix = rule @ torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0, 0.3, 2.0]))
        self.x = torch.randn(count, LEN, D, generator=g)
        chosen = torch.distributions.Categorical(logits=3 * self.x @ rule.T)
        torch.manual_seed(seed)
        self.ids = torch.cat([torch.zeros(count, 1, dtype=torch.long), chosen.sample()[:, :-1]], 1)

    def __len__(self) -> int:
        return len(self.x)

    def _logits(self, rows: Sequence[int], head: Tensor | None) -> Tensor:
        x = self.x[list(rows)]
        return (x if head is None else x + x @ head) @ self.matrix.T

    def losses(self, head: Tensor | None) -> Tensor:
        log_p = self._logits(range(len(self)), head)[:, :-1].log_softmax(-1)
        return -log_p.gather(-1, self.ids[:, 1:, None])[..., 0].mean(1)

    def logits(self, rows: Sequence[int], head: Tensor) -> tuple[Tensor, Tensor]:
        return self._logits(rows, head), self.ids[list(rows)]


def fitted(steps: int, *starts: Tensor, rate: float = 0.3) -> tuple[Tensor, float]:
    fit, select = Features(1, 40), Features(2, 40)
    head, outcome = fit_head(fit, select, starts, Budget(steps, rate, 8, 0, "warm"))
    assert outcome.steps == steps
    return head, float(select.losses(head).mean())


def test_a_fitted_head_gains_and_is_no_worse_than_any_start():
    zero, other = torch.zeros(D, D), torch.eye(D) * 0.5
    select = Features(2, 40)
    before = [float(select.losses(s).mean()) for s in (zero, other)]
    assert fitted(0, zero, other)[1] == pytest.approx(min(before))
    assert fitted(60, zero, other)[1] < min(before) - 0.1


def test_driven_too_hard_it_keeps_what_it_had():
    zero = torch.zeros(D, D)
    assert fitted(8, zero, rate=1e4)[1] <= float(Features(2, 40).losses(None).mean()) + 1e-6


def test_the_loss_is_convex_so_that_two_starts_end_alike():
    generator = torch.Generator().manual_seed(0)
    ends = [
        fitted(400, start)[1] for start in (torch.zeros(D, D), torch.randn(D, D, generator=generator) * 0.3)
    ]
    assert ends[0] == pytest.approx(ends[1], abs=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_map_before_the_head_is_a_head_of_the_same_class(family, save_model, tmp_path):
    from peelcli.checkpoint.model import BlockwiseModel

    model = BlockwiseModel(save_model(family), dtype=torch.float32, device="cpu", offload_dir=tmp_path / "o")
    ids = torch.arange(20).view(2, 10) + 3
    hidden = model.prepare(ids).hidden
    a = torch.randn(model.head_width, model.head_width, generator=torch.Generator().manual_seed(1)) * 0.1
    turned = model.logits(hidden, ids, a)
    assert not torch.allclose(turned, model.logits(hidden, ids), atol=1e-3)
    matrix = model.model.get_output_embeddings()
    embedded = model.model.get_input_embeddings().weight
    matrix.weight = torch.nn.Parameter(matrix.weight @ (torch.eye(len(a)) + a).T, requires_grad=False)
    assert model.model.get_input_embeddings().weight is embedded  # tied or not, the embedding stays
    assert torch.allclose(turned, model.logits(hidden, ids), atol=1e-4)
