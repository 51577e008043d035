"""The light head: a linear map before the network's own head, fitted by cross-entropy on states that stay put.

x → x + x·A, with x (d_model,) what enters the head's matrix W and A (d_model, d_model), so that it is a head of the
same class: W(I + A)ᵀ. The loss is convex in A. On a peeled path it is the head of "Trust, but Verify", arXiv
2605.02853; on the trained states it is the control that tells what a refitted head alone would gain.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from peelcli.records import FitOutcome
from peelcli.references.interface import Budget
from peelcli.references.micro_batches import add_gradients
from peelcli.references.regression import sequence_order

CHECKS = 4  # how often the fit looks at `select`


class HeadData(Protocol):
    """Sequences of one part of the split, with the last states of a network on them."""

    def __len__(self) -> int:
        """How many sequences there are."""
        ...

    def losses(self, head: Tensor | None) -> Tensor:
        """NLL of each sequence (n_seq,) with the map A before the head; None: as trained."""
        ...

    def logits(self, rows: Sequence[int], head: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, seq_len, vocab) of those sequences and their ids (n, seq_len); differentiable in `head`."""
        ...


def fit_head(
    fit: HeadData, select: HeadData, starts: Sequence[Tensor], budget: Budget
) -> tuple[Tensor, FitOutcome]:
    """A (d_model, d_model) float32: the best on `select` of `starts` and of what training from there passes through.

    The learning rate is relative: with 0.1 a step moves the head's inputs by about a tenth of their size.
    """
    began = time.perf_counter()
    curve = [float(select.losses(start).mean()) for start in starts]
    best = min(curve)
    kept = starts[curve.index(best)].detach().clone()
    head = kept.clone().requires_grad_()
    rate = budget.learning_rate / len(head) ** 0.5
    optimizer = torch.optim.Adam([head], lr=rate, betas=(0.9, 0.98))
    order = sequence_order(len(fit), budget)
    check_every = max(1, budget.steps // CHECKS)

    def part_of(now: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
        """What some sequences of a batch add to its mean loss."""
        logits, ids = fit.logits(rows, now["head"])
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten().to(logits.device)
        )
        return loss * (len(rows) / budget.batch_size)

    curve = [best]
    for step in range(budget.steps):
        optimizer.param_groups[0]["lr"] = rate * (1.0 - step / budget.steps)
        optimizer.zero_grad(set_to_none=True)
        add_gradients(part_of, {"head": head}, order[step], at_once=budget.at_once)
        optimizer.step()
        if (step + 1) % check_every == 0 or step + 1 == budget.steps:
            curve.append(float(select.losses(head.detach()).mean()))
            if curve[-1] < best:
                best, kept = curve[-1], head.detach().clone()
    gained, late = curve[0] - best, min(curve[:-2] or curve) - best
    reason = f"{gained:.4f} nats gained on select, {max(late, 0.0):.4f} of them in the last half of the steps"
    converged = late <= 0.25 * gained + 1e-3
    seconds = round(time.perf_counter() - began, 3)
    return kept, FitOutcome("trained", budget.steps, converged, reason, None, None, seconds)
