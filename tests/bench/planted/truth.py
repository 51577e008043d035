"""What a fault really does, measured on held-out text: the truth that detectors are held against.

harm    the loss that the healthy twin is better by, as far as training the hurt layer alone (the others frozen) gains
        it back beyond what the same training gains in the twin
idle    what dropping the layer, its attention or its MLP costs is less than a tenth of what it costs in the twin
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from decoders import Recipe, batches, blocks_of, loss_on, part_of, tokens
from torch import nn

from planted.cases import BASES, Case
from planted.plant import checkpoint_of, held_out_ids, load, twin_of

HARMFUL, IDLE = 0.01, 0.1  # nats per token; share of the twin's cost
RECOVERY_STEPS, RECOVERY_RATE, RECOVERY_BATCH, RECOVERY_SEED = 100, 1e-3, 8, 7
HELD_OUT_TOKENS = 16_384
PARTS = ("block", "attention", "mlp")


@dataclass(frozen=True)
class Truth:
    """Of one hurt layer, nats per token."""

    layer: int
    deficit: float  # loss less the twin's
    recovered: float  # what training it alone gains…
    usual: float  # …and gains in the twin
    drops: dict[str, float]  # what dropping it, or one of its sublayers, costs…
    twin_drops: dict[str, float]  # …and costs in the twin

    @property
    def harm(self) -> float:
        """See above."""
        return min(self.deficit, self.recovered - max(self.usual, 0.0))

    @property
    def is_harmful(self) -> bool:
        """Whether `surpassed` or `matched` is right."""
        return self.harm > HARMFUL

    @property
    def is_idle(self) -> bool:
        """Whether `matched` is right."""
        return any(self.drops[part] < IDLE * self.twin_drops[part] for part in PARTS)

    @property
    def is_positive(self) -> bool:
        """Whether the layer ought to be flagged."""
        return self.is_harmful or self.is_idle


def truths_of(case: Case, shared: Path, cache: Path) -> list[Truth]:
    """One for each hurt layer."""
    recipe = BASES[case.base].recipe
    held_out = held_out_ids(recipe, shared, cache, HELD_OUT_TOKENS).flatten()
    hurt, twin = (load(find(case, shared, cache)) for find in (checkpoint_of, twin_of))
    loss, twin_loss = (loss_on(model, held_out, recipe.seq_len) for model in (hurt, twin))
    found = []
    for layer in case.layers:
        drops = [
            {part: loss_without(model, layer, part, held_out, recipe) - start for part in PARTS}
            for model, start in ((hurt, loss), (twin, twin_loss))
        ]
        gains = [
            start - _trained_on(find(case, shared, cache), layer, recipe, shared, cache)
            for find, start in ((checkpoint_of, loss), (twin_of, twin_loss))
        ]
        found.append(Truth(layer, loss - twin_loss, *gains, *drops))
    return found


def loss_without(model: nn.Module, layer: int, part: str, held_out: torch.Tensor, recipe: Recipe) -> float:
    """The loss on `held_out` with the layer, or a part of it, dropped."""
    with dropped(model, layer, part):
        return loss_on(model, held_out, recipe.seq_len)


@contextmanager
def dropped(model: nn.Module, layer: int, part: str = "block") -> Iterator[None]:
    """For the length of the context the layer, or a part of it, adds nothing to the residual stream."""
    block = blocks_of(model)[layer - 1]
    ends = [m for p in part_of(block, part) for n, m in p.named_modules() if _is_last(n)]
    kept = [(p, p.detach().clone()) for m in ends for p in m.parameters()]
    with torch.no_grad():
        for p, _ in kept:
            p.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def _is_last(name: str) -> bool:
    """Whether a matrix writes to the residual stream, by its name."""
    return name.rpartition(".")[2] in ("o_proj", "down_proj", "c_proj")


@cache  # the twin's are asked for again and again
def _trained_on(directory: Path, layer: int, recipe: Recipe, shared: Path, cache: Path) -> float:
    """The least loss on held-out text that training one layer alone passes through."""
    held_out = held_out_ids(recipe, shared, cache, HELD_OUT_TOKENS).flatten()
    model = load(directory)
    for p in model.parameters():
        p.requires_grad_(False)
    own = list(blocks_of(model)[layer - 1].parameters())
    for p in own:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(own, lr=RECOVERY_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    train = tokens(recipe, shared).train
    source = batches(replace(recipe, seed=RECOVERY_SEED, batch_size=RECOVERY_BATCH), train)
    best = loss_on(model, held_out, recipe.seq_len)
    for step in range(1, RECOVERY_STEPS + 1):
        ids = next(source)
        optimizer.param_groups[0]["lr"] = RECOVERY_RATE * (1.0 - (step - 1) / RECOVERY_STEPS)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % (RECOVERY_STEPS // 2) == 0:
            best = min(best, loss_on(model, held_out, recipe.seq_len))
    return best
