"""The loss of a checkpoint run plainly from embedding to head, with or without a reference in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.records import Dropped, Other, Reference, Stored, Trained
from peelcli.references.interface import Replacement
from peelcli.runtime.batch_sizes import head_batch
from peelcli.scoring.losses import token_losses


@torch.no_grad()
def mean_nll(
    model: BlockwiseModel, ids: Tensor, batch_size: int, put: Reference | None, replacement: Replacement
) -> float:
    """Mean next-token loss on `ids` (n_seq, seq_len), with the reference `put` in place (None: as trained)."""
    hidden = torch.cat(
        [model.prepare(ids[at : at + batch_size]).hidden for at in range(0, len(ids), batch_size)]
    )
    for layer in range(1, model.num_layers + 1):
        put_here = Trained() if put is None else put.weights_at(layer)
        if isinstance(put_here, Dropped) and put_here.is_block:
            continue
        with model.block(layer) as module:
            weights: dict[str, Tensor] | None = None
            if isinstance(put_here, Other):
                weights = model.read_weights(put_here.layer)
            elif isinstance(put_here, Stored):
                trained = dict(module.named_parameters())
                weights = replacement.weights(next(module.parameters()), trained)
            dropped = put_here.sublayers if isinstance(put_here, Dropped) else ()
            for at in range(0, len(ids), batch_size):
                rows = slice(at, at + batch_size)
                hidden[rows] = model.run_block(layer, module, hidden[rows], ids[rows], weights, dropped)
    return _loss(model, hidden, ids, None)


@torch.no_grad()
def path_mean_nll(
    model: BlockwiseModel, ids: Tensor, batch_size: int, blocks: Sequence[Replacement], head: Tensor
) -> float:
    """The same of a peeled path: its block in place of every layer (none: the trained ones), and its head."""
    hidden = torch.cat(
        [model.prepare(ids[at : at + batch_size]).hidden for at in range(0, len(ids), batch_size)]
    )
    for layer in range(1, model.num_layers + 1):
        with model.block(layer) as module:
            weights = blocks[layer - 1].weights(next(module.parameters())) if blocks else None
            for at in range(0, len(ids), batch_size):
                rows = slice(at, at + batch_size)
                hidden[rows] = model.run_block(layer, module, hidden[rows], ids[rows], weights)
    return _loss(model, hidden, ids, head.to(model.device))


def _loss(model: BlockwiseModel, hidden: Tensor, ids: Tensor, head: Tensor | None) -> float:
    step = head_batch(ids.shape[1], model.vocab_size, model.device)
    losses = []
    for at in range(0, len(ids), step):
        rows = slice(at, at + step)
        losses.append(token_losses(model.logits(hidden[rows], ids[rows], head), ids[rows])[0])
    return float(torch.cat(losses).mean())
