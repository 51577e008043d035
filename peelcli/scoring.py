"""One sweep over the blocks that carries every candidate's states to the loss: no pass is made per candidate.

Layer by layer, each candidate that has begun is moved on through the trained block, and the candidates that begin
there are put in place. Their states lie in a scratch file, so that memory does not grow with their number; the file
of one layer is whole before that of the layer below is overwritten, so that a killed sweep goes on from there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from peelcli.activations import ActivationFile, require_space
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.progress import Progress
from peelcli.records import Reference
from peelcli.references.interface import Witness
from peelcli.workers import in_parallel


@dataclass(frozen=True)
class Candidate:
    """A reference to be measured; `witness` loads the weights of a layer when it comes (None: none take its place)."""

    reference: Reference
    witness: Callable[[int], Witness] | None


@dataclass
class Losses:
    """What the sweep measured of each candidate, by key; arrays are per sequence, rows select then eval."""

    nll: dict[str, np.ndarray] = field(default_factory=dict)
    kl: dict[str, np.ndarray] = field(default_factory=dict)
    fvu_eval: dict[str, float] = field(default_factory=dict)


def token_losses(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean NLL of each sequence (n_seq,), and log-probabilities (n_seq, seq_len−1, vocab)."""
    log_p = logits[:, :-1].float().log_softmax(-1)
    target = ids[:, 1:, None].to(log_p.device)
    return -log_p.gather(-1, target)[..., 0].double().mean(1), log_p


def predictive_entropy(log_p: Tensor) -> Tensor:
    """Mean entropy of each sequence's predictions (n_seq,) from log-probabilities (n_seq, seq_len−1, vocab)."""
    return -(log_p.exp() * log_p).sum(-1).double().mean(1)


def block_batch(seq_len: int) -> int:
    """Sequences that go through a block at once: about a thousand tokens, whose activations stay in the cache."""
    return max(1, 1024 // seq_len)


def head_batch(seq_len: int, vocab_size: int) -> int:
    """Sequences whose logits are held at once: about 8 MB in float32, and as much for each of a few steps over them.

    More is slower (64 MB take three times as long): the allocator asks the system for such tensors anew each time.
    """
    return max(1, 2**21 // max(1, seq_len * vocab_size))


class Sweep:
    """Carries candidates through the network; iterate over `run()` for progress, then read `losses`."""

    def __init__(
        self,
        model: BlockwiseModel,
        acts: ActivationFile,
        candidates: Sequence[Candidate],
        scratch: Path,
        *,
        key: str,
        batch_size: int,
    ) -> None:
        """`scratch` is a directory for the states; `key` names the fit, so that only its own leftovers are used."""
        self.model, self.acts, self.scratch, self.batch_size = model, acts, scratch, batch_size
        self.candidates = sorted(candidates, key=lambda c: (c.reference.layer, c.reference.key))
        self.key = json.dumps([key, [c.reference.key for c in self.candidates], batch_size])
        self.rows = slice(acts.rows["select"].start, acts.rows["eval"].stop)
        self.n_rows = self.rows.stop - self.rows.start
        self.ids = acts.ids[self.rows]
        self.losses = Losses()
        width = acts.states(acts.stored[0], slice(0, 1)).shape[-1]
        self._shape = (self.ids.shape[1], width)
        self._row_nbytes = self._shape[0] * width * torch.empty(0, dtype=model.dtype).element_size()

    @property
    def scratch_nbytes(self) -> int:
        """Disk that the scratch files take at their largest: two layers of all candidates."""
        return 2 * len(self.candidates) * self.n_rows * self._row_nbytes

    @torch.no_grad()
    def run(self) -> Iterator[Progress]:
        """Go through the layers, then measure; yields after each layer."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        done = self._resume()
        first = min((c.reference.layer for c in self.candidates), default=1)
        if not done:
            require_space(self.scratch, self.scratch_nbytes, "the scratch file of the sweep")
        for layer in range(max(done + 1, first), self.model.num_layers + 1):
            yield Progress("score", layer - 1, self.model.num_layers + 1, f"layer {layer}")
            self._advance(layer)
        yield Progress("score", self.model.num_layers, self.model.num_layers + 1, "loss")
        self._measure()
        self._clear()
        yield Progress("score", self.model.num_layers + 1, self.model.num_layers + 1, "loss")

    # -- the states of one layer ----------------------------------------------------------------------------------

    def _path(self, layer: int) -> Path:
        """Two files in turn: while one is overwritten the states of the layer below stay whole in the other."""
        return self.scratch / f"sweep-{layer % 2}.states"

    @property
    def _index(self) -> Path:
        return self.scratch / "sweep-index.json"

    def _resume(self) -> int:
        """The last layer that an interrupted sweep of the same candidates finished, or 0."""
        if not self._index.exists():
            return 0
        record = json.loads(self._index.read_text(encoding="utf-8"))
        if record["key"] != self.key:
            self._index.unlink()  # what it speaks of is about to be overwritten
            return 0
        self.losses.fvu_eval = record["fvu_eval"]
        return int(record["layer"])

    def _advance(self, layer: int) -> None:
        begun = [c for c in self.candidates if c.reference.layer < layer]
        starting = [c for c in self.candidates if c.reference.layer == layer]
        try:
            self._path(layer).touch()
            with self._path(layer).open("r+b") as out, self.model.block(layer) as module:
                if begun:
                    with self._path(layer - 1).open("rb") as states:
                        self._carry(begun, layer, module, states, out)
                for candidate in starting:
                    self._begin(candidate, module, out)
            record = {"key": self.key, "layer": layer, "fvu_eval": self.losses.fvu_eval}
            partial = self._index.with_suffix(".partial")
            partial.write_text(json.dumps(record), encoding="utf-8")
            partial.replace(self._index)
        except OSError:
            self._clear()  # a full disk: give back what was taken of it
            raise

    def _clear(self) -> None:
        for leftover in self.scratch.glob("sweep-*"):
            leftover.unlink()

    def _batches(self) -> Iterator[slice]:
        for at in range(0, self.n_rows, self.batch_size):
            yield slice(at, min(at + self.batch_size, self.n_rows))

    def _carry(
        self, begun: Sequence[Candidate], layer: int, module: nn.Module, states: BinaryIO, out: BinaryIO
    ) -> None:
        """Move candidates' states through the trained block; a span that reaches further is passed on as it is."""
        for rows in self._batches():
            # What depends on the shape of a batch alone is found here, before threads would all look for it.
            self.model.arguments(layer, self.ids[rows])
        # Blocks of their own, for weights that are put in place for a call are in the way of other threads.
        changed = {c: self._changed(c, layer, module) for c in begun if c.reference.stands_at(layer)}

        def stored() -> Iterator[tuple[Candidate, slice, Tensor]]:
            for candidate in begun:
                for rows in self._batches():
                    yield candidate, rows, self._read(states, rows.stop - rows.start)

        def moved(item: tuple[Candidate, slice, Tensor]) -> Tensor:
            candidate, rows, hidden = item
            if candidate.reference.bypasses(layer):
                return hidden
            block = changed.get(candidate, module)
            return self.model.run_block(layer, block, hidden.to(self.model.device), self.ids[rows])

        for hidden in in_parallel(moved, stored(), at_once=self.model.runs_at_once(layer)):
            self._write(out, hidden)

    def _changed(self, candidate: Candidate, layer: int, module: nn.Module) -> nn.Module:
        """A copy of the block with the weights that the candidate has there."""
        assert candidate.witness is not None
        block = copy.deepcopy(module)
        weights = candidate.witness(layer).weights(next(block.parameters()))
        for name, parameter in block.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name])
        return block

    def _begin(self, candidate: Candidate, module: nn.Module, out: BinaryIO) -> None:
        """Put one candidate in place of its layer and note how much of the update it leaves unexplained."""
        reference = candidate.reference
        weights = (
            candidate.witness(reference.layer).weights(next(module.parameters()))
            if candidate.witness
            else None
        )
        error = update = 0.0
        n_select = self.acts.rows["select"].stop - self.acts.rows["select"].start
        for rows in self._batches():
            absolute = slice(rows.start + self.rows.start, rows.stop + self.rows.start)
            before = self.acts.states(reference.layer - 1, absolute).to(self.model.device, self.model.dtype)
            if reference.kind == "identity" and reference.sublayer is None:
                hidden = before
            else:
                hidden = self.model.run_block(
                    reference.layer, module, before, self.ids[rows], weights, reference.dropped
                )
            self._write(out, hidden)
            if reference.kind == "exchange":
                continue  # it aims at no state
            after = self.acts.states(reference.target, absolute).to(hidden)
            on_eval = slice(max(0, n_select - rows.start), None)
            error += float((hidden[on_eval].double() - after[on_eval].double()).square().sum())
            update += float((after[on_eval].double() - before[on_eval].double()).square().sum())
        if reference.kind != "exchange":
            self.losses.fvu_eval[reference.key] = error / max(update, 1e-30)

    def _read(self, file: BinaryIO, count: int) -> Tensor:
        raw = bytearray(file.read(count * self._row_nbytes))
        return torch.frombuffer(raw, dtype=self.model.dtype).view(count, *self._shape)

    def _write(self, file: BinaryIO, hidden: Tensor) -> None:
        file.write(hidden.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    # -- the loss -------------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """NLL of every candidate and its divergence from the trained model, sequence by sequence."""
        keys = [c.reference.key for c in self.candidates]
        for key in keys:
            self.losses.nll[key] = np.zeros(self.n_rows)
            self.losses.kl[key] = np.zeros(self.n_rows)
        if not keys:
            return
        step = head_batch(self.ids.shape[1], self.model.vocab_size)
        last = self.model.num_layers
        with self._path(last).open("rb") as states:
            for at in range(0, self.n_rows, step):
                rows = slice(at, min(at + step, self.n_rows))
                ids = self.ids[rows]
                absolute = slice(rows.start + self.rows.start, rows.stop + self.rows.start)
                trained = self.acts.states(last, absolute).to(self.model.device, self.model.dtype)
                _, log_p = token_losses(self.model.logits(trained, ids), ids)
                p = log_p.exp()
                for index, key in enumerate(keys):
                    states.seek((index * self.n_rows + at) * self._row_nbytes)
                    hidden = self._read(states, rows.stop - rows.start).to(self.model.device)
                    nll, log_q = token_losses(self.model.logits(hidden, ids), ids)
                    self.losses.nll[key][rows] = nll.cpu().numpy()
                    self.losses.kl[key][rows] = (p * (log_p - log_q)).sum(-1).double().mean(1).cpu().numpy()
