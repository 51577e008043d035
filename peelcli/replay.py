"""Replay a witness: put a stored reference into the checkpoint, run it plainly, and compare the gap with the report's.

Nothing of the sweep is used again: the checkpoint is run from its embedding to its loss, with and without the
reference, on the token ids that the fit kept.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peelcli import fitstore
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.errors import ReplayError
from peelcli.progress import Progress
from peelcli.records import Reference
from peelcli.references.interface import Witness
from peelcli.scoring import head_batch, token_losses

ABSOLUTE, RELATIVE = 1e-3, 0.02  # nats, and share of the gap, that another machine's rounding may make


@dataclass(frozen=True)
class Replay:
    """One witness measured again; gaps in nats per token, > 0 where the reference has the lower loss."""

    reference: Reference
    reported: float
    measured: float

    @property
    def holds(self) -> bool:
        """Whether the reported gap came back."""
        return abs(self.measured - self.reported) <= ABSOLUTE + RELATIVE * abs(self.reported)


@torch.no_grad()
def mean_nll(
    model: BlockwiseModel, ids: Tensor, batch_size: int, put: Reference | None, witness: Witness
) -> float:
    """Mean next-token loss on `ids` (n_seq, seq_len), with the reference `put` in place (None: as trained)."""
    hidden = torch.cat(
        [model.prepare(ids[at : at + batch_size]).hidden for at in range(0, len(ids), batch_size)]
    )
    for layer in range(1, model.num_layers + 1):
        if put is not None and put.layer < layer <= put.target:
            continue  # a span has done the work of this layer
        here = put is not None and put.layer == layer
        if here and put is not None and put.kind == "identity" and put.sublayer is None:
            continue
        with model.block(layer) as module:
            weights = witness.weights(next(module.parameters())) if here else None
            dropped = put.dropped if here and put is not None else ()
            for at in range(0, len(ids), batch_size):
                rows = slice(at, at + batch_size)
                hidden[rows] = model.run_block(layer, module, hidden[rows], ids[rows], weights, dropped)
    step = head_batch(ids.shape[1], model.vocab_size)
    losses = [
        token_losses(model.logits(hidden[at : at + step], ids[at : at + step]), ids[at : at + step])[0]
        for at in range(0, len(ids), step)
    ]
    return float(torch.cat(losses).mean())


def replay_steps(
    fit: Path, model: BlockwiseModel, gaps: Sequence[tuple[Reference, float]], batch_size: int
) -> Generator[Progress, None, list[Replay]]:
    """Measure every reference of `gaps` (with its reported gap) again. Raises ReplayError where one differs."""
    ids = fitstore.read_eval_ids(fit)
    yield Progress("verify", 0, len(gaps) + 1, "as trained")
    trained = mean_nll(model, ids, batch_size, None, Witness())
    found = []
    for done, (reference, reported) in enumerate(gaps, start=1):
        yield Progress("verify", done, len(gaps) + 1, reference.key)
        witness = Witness() if reference.kind == "identity" else fitstore.load_witness(fit, reference)
        measured = trained - mean_nll(model, ids, batch_size, reference, witness)
        found.append(Replay(reference, reported, measured))
    yield Progress("verify", len(gaps) + 1, len(gaps) + 1, "all witnesses")
    failed = [r for r in found if not r.holds]
    if failed:
        lines = [
            f"  {r.reference.key}: reported {r.reported:+.5f}, measured {r.measured:+.5f}" for r in failed
        ]
        raise ReplayError(
            f"{fit}: {len(failed)} of {len(found)} witnesses did not reproduce their gap (nats per token):\n"
            + "\n".join(lines)
            + "\nThe fit and the checkpoint do not belong together, or the file was changed. Fit again."
        )
    return found
