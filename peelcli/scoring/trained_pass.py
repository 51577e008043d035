"""The first stage: run the checkpoint over the calibration tokens and store every layer's trained states.

Layer by layer: each block is read once, run over all sequences, and let go. A generator of progress; it prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peelcli.calibration import Calibration
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.single_pass import require_blockwise
from peelcli.errors import CheckpointChangedError, CheckpointError
from peelcli.records.progress import Progress
from peelcli.runtime.batch_sizes import free_memory, head_batch
from peelcli.scoring.losses import predictive_entropy, token_losses
from peelcli.storage.activations import ActivationWriter

STORE_NBYTES = 2**24  # of states that are written at once


@dataclass(frozen=True)
class Extraction:
    """What to extract: `about` and `config` are stored as they are; `stored` says which of O_0…O_K to keep."""

    output: Path
    about: dict[str, Any]
    config: dict[str, Any]
    stored: tuple[int, ...]
    store_dtype: str
    batch_size: int
    resume: bool = True


def stored_states(num_layers: int, layers: tuple[int, ...], longest_span: int = 3) -> tuple[int, ...]:
    """Which states the references of `layers` need: their inputs, their targets, and the last for the loss."""
    wanted = {num_layers}
    for layer in layers:
        wanted.update(range(layer - 1, min(layer + longest_span - 1, num_layers) + 1))
    return tuple(sorted(wanted))


@torch.no_grad()
def extract(model: BlockwiseModel, calibration: Calibration, task: Extraction) -> Iterator[Progress]:
    """Write `task.output`, yielding after each layer. Raises CheckpointError where a layer's states are not finite."""
    sequences = calibration.split.sequences
    ids = torch.from_numpy(sequences)
    require_blockwise(model, ids[:2])  # before anything is written
    width = model.prepare(ids[:1]).hidden.shape[-1]
    writer = ActivationWriter(
        task.output,
        about=task.about,
        config=task.config,
        ids=sequences,
        stored=task.stored,
        d_model=width,
        dtype=task.store_dtype,
        resume=task.resume,
    )
    try:
        yield from _layers(model, ids, width, writer, task)
    except (OSError, NonFiniteStatesError, CheckpointChangedError):
        writer.discard()  # a full disk, a checkpoint that is broken or changes: leave no half of a file in the way
        raise
    finally:
        writer.close()


def _layers(
    model: BlockwiseModel, ids: Tensor, width: int, writer: ActivationWriter, task: Extraction
) -> Iterator[Progress]:
    last = model.num_layers
    total = last + 2
    # The states of one layer, (n_seq, seq_len, d_model), moved on in place: memory does not grow with depth.
    hidden = _room_for((*ids.shape, width), model)
    first = _go_on_from(writer, hidden, task, last)
    for layer in range(first, last + 1):
        yield Progress("extract", layer, total, f"layer {layer}" if layer else "embedding")
        store = layer in task.stored and layer not in writer.finished
        if layer == 0:
            for at in range(0, len(ids), task.batch_size):
                rows = slice(at, at + task.batch_size)
                hidden[rows] = model.prepare(ids[rows]).hidden
        else:
            with model.block(layer) as module:
                for at in range(0, len(ids), task.batch_size):
                    rows = slice(at, at + task.batch_size)
                    moved = model.run_block(layer, module, hidden[rows].to(model.device), ids[rows])
                    hidden[rows] = moved.to(hidden.device)
        # Both ends are NaN where any value is; unlike isfinite, this needs no memory of its own.
        if not all(map(math.isfinite, map(float, hidden.aminmax()))):
            raise NonFiniteStatesError(layer)
        if store:
            _store(writer, layer, hidden)
            writer.finish_layer(layer)
    yield Progress("extract", last + 1, total, "loss")
    nll, entropy = _losses(model, hidden, ids)
    model.stamp.require_unchanged()
    writer.finish(nll, entropy)
    yield Progress("extract", total, total, "loss")


def _room_for(shape: Sequence[int], model: BlockwiseModel) -> Tensor:
    """An empty tensor for the states of a layer: where the model runs if a quarter of the memory there suffices."""
    nbytes = math.prod(shape) * model.dtype.itemsize
    device = model.device if nbytes <= free_memory(model.device) // 4 else "cpu"
    return torch.empty(*shape, dtype=model.dtype, device=device)


class NonFiniteStatesError(CheckpointError):
    """The weights are finite and the states after `layer` are not."""

    def __init__(self, layer: int) -> None:
        """Name the layer after which the first non-finite value stands (0: the embedding)."""
        self.layer = layer
        where = f"layer {layer}" if layer else "the embedding"
        super().__init__(
            f"the states after {where} hold NaN or infinity though its weights are finite. "
            "Try --dtype float32; if it stays, that part of the checkpoint is broken."
        )


def _store(writer: ActivationWriter, layer: int, hidden: Tensor) -> None:
    """Write O_layer, hidden (n_seq, seq_len, d_model), in pieces: few calls, and small copies in another dtype."""
    step = max(1, STORE_NBYTES // (hidden[0].numel() * hidden.element_size()))
    for at in range(0, len(hidden), step):
        writer.write(layer, at, hidden[at : at + step])


def _go_on_from(writer: ActivationWriter, hidden: Tensor, task: Extraction, last: int) -> int:
    """Fill `hidden` with the last whole states of an interrupted run; returns the layer to go on with.

    Only where they were stored without rounding; otherwise the pass begins anew, and what is stored stays.
    """
    exact = getattr(torch, task.store_dtype) == hidden.dtype
    whole = [layer for layer in writer.finished if layer <= last]
    if not (exact and whole):
        return 0
    newest = max(whole)
    for at in range(0, len(hidden), task.batch_size):
        hidden[at : at + task.batch_size] = writer.read(newest, slice(at, at + task.batch_size))
    return newest + 1


def _losses(model: BlockwiseModel, hidden: Tensor, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """NLL and predictive entropy of the trained model, (n_seq,) each."""
    step = head_batch(ids.shape[1], model.vocab_size, model.device)
    parts = []
    for at in range(0, len(ids), step):
        rows = slice(at, at + step)
        nll, log_p = token_losses(model.logits(hidden[rows].to(model.device), ids[rows]), ids[rows])
        parts.append(torch.stack([nll, predictive_entropy(log_p)]).cpu())
    joined = torch.cat(parts, dim=1).numpy()
    return joined[0], joined[1]
