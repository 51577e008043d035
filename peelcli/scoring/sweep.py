"""One sweep over the blocks that carries every candidate's states to the loss: no pass is made per candidate.

Layer by layer, each candidate that has begun is moved on through the trained block, and the candidates that begin
there are put in place. Their states lie in a scratch file, so that memory does not grow with their number; the file
of one layer is whole before that of the layer below is overwritten, so that a killed sweep goes on from there. On an
accelerator they stay in its memory, so many candidates at a time as fit.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from peelcli.checkpoint.block import put_in_place, same_weights, silence
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.records import Dropped, Reference, Trained
from peelcli.records.progress import Progress
from peelcli.references.interface import Replacement
from peelcli.runtime import durable
from peelcli.runtime.batch_sizes import free_memory, head_batch
from peelcli.runtime.workers import in_parallel
from peelcli.scoring.activation_buffer import ActivationBuffer, DeviceBuffer, FileBuffer
from peelcli.scoring.losses import token_losses
from peelcli.storage.activations import ActivationFile, require_space

_HELD_NBYTES = 2**26  # states of a layer up to 64 MB are held while candidates begin there


@dataclass(frozen=True)
class Candidate:
    """A reference to be measured; `witness` loads the weights of a layer when it comes (None: none take its place).

    With an `eval_stride` above 1 it is measured on every so-manyth sequence of `eval` alone, else on `select` as well
    unless it is not chosen by that (`on_select`).
    """

    reference: Reference
    replacement: Callable[[int], Replacement] | None
    eval_stride: int = 1
    on_select: bool = True


@dataclass
class Losses:
    """What the sweep measured of each candidate, by key; arrays are per sequence, rows select then eval.

    Of a candidate measured on fewer the arrays are of those sequences alone.
    """

    nll: dict[str, np.ndarray] = field(default_factory=dict)
    kl: dict[str, np.ndarray] = field(default_factory=dict)
    fvu_eval: dict[str, float] = field(default_factory=dict)


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop, rows.step)


def _changes(candidate: Candidate, layer: int) -> bool:
    """Whether the layer runs with other weights than its own, or with fewer of them."""
    return not isinstance(candidate.reference.weights_at(layer), Trained)


class _Start(NamedTuple):
    """One batch of a candidate at its own layer: trained states O_{l−1} and O_target, (n, seq_len, d_model) each."""

    candidate: Candidate
    rows: range
    block: nn.Module | None  # None: O_{l−1} is passed on
    before: Tensor
    after: Tensor


class _End(NamedTuple):
    """One batch of a candidate at the end, and what the trained model predicts there, (n, seq_len−1, vocab)."""

    candidate: Candidate
    place: slice  # of the batch among the candidate's own sequences
    ids: Tensor
    hidden: Tensor
    p: Tensor
    log_p: Tensor


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
        stage: str = "score",
    ) -> None:
        """`scratch` is a directory for the states; `key` names the fit, so that only its own leftovers are used.

        stage: the name that progress and the scratch files go by, for several sweeps of one fit.
        """
        self.stage = stage
        self.model, self.acts, self.scratch, self.batch_size = model, acts, scratch, batch_size
        self.candidates = sorted(candidates, key=lambda c: (c.reference.layer, c.reference.key))
        measured = [(c.reference.key, c.eval_stride, c.on_select) for c in self.candidates]
        self.key = json.dumps([key, measured, batch_size])
        self.rows = slice(acts.rows["select"].start, acts.rows["eval"].stop)
        self.n_rows = self.rows.stop - self.rows.start
        self.n_select = acts.rows["select"].stop - acts.rows["select"].start
        self.ids = acts.ids[self.rows]
        self.losses = Losses()
        self._now: list[Candidate] = []  # those that are carried at present
        self._on_device = False
        self._carried: ActivationBuffer
        self._held: dict[int, Tensor] = {}  # O_l of all rows, by layer: what begins at one layer shares them
        width = acts.states(acts.stored[0], slice(0, 1)).shape[-1]
        self._shape = (self.ids.shape[1], width)
        self._row_nbytes = self._shape[0] * width * model.dtype.itemsize

    @property
    def scratch_nbytes(self) -> int:
        """Disk that the scratch files take at their largest: two layers of all candidates."""
        return 2 * self._nbytes(self.candidates)

    def _nbytes(self, candidates: Sequence[Candidate]) -> int:
        return sum(len(self._rows(c)) for c in candidates) * self._row_nbytes

    @torch.no_grad()
    def run(self) -> Iterator[Progress]:
        """Go through the layers, then measure; yields after each layer."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        end = self.model.num_layers + 1
        room = free_memory(self.model.device) // 2
        largest = max((self._nbytes([c]) for c in self.candidates), default=0)
        self._on_device = 0 < largest <= room
        for group in self._groups(room) if self._on_device else [self.candidates]:
            self._now = group
            done = self._start()
            first = min((c.reference.layer for c in self._now), default=1)
            for layer in range(max(done + 1, first), end):
                yield Progress(self.stage, layer - 1, end, f"layer {layer}")
                self._advance(layer)
            yield Progress(self.stage, end - 1, end, "loss")
            self._measure()
            self._clear()
        yield Progress(self.stage, end, end, "loss")

    def _groups(self, room: int) -> list[list[Candidate]]:
        """The candidates, in so many groups that the states of each fit into `room` bytes.

        Those that begin in late layers stay together, whose sweep is short.
        """
        groups: list[list[Candidate]] = [[]]
        for candidate in self.candidates:
            if self._nbytes([*groups[-1], candidate]) > room:
                groups.append([])
            groups[-1].append(candidate)
        return groups

    def _start(self) -> int:
        """Make room for the states of the group; returns the last layer that an interrupted sweep of it finished."""
        if self._on_device:
            num_rows = sum(len(self._rows(c)) for c in self._now)
            self._carried = DeviceBuffer(num_rows, self._shape, self.model.dtype, self.model.device)
            return 0
        self._carried = files = FileBuffer(self.scratch, self.stage, self._shape, self.model.dtype)
        done = self._resume(files)
        if not done:
            require_space(self.scratch, self.scratch_nbytes, "the scratch file of the sweep")
        return done

    # -- the states of one layer ----------------------------------------------------------------------------------

    @property
    def _index(self) -> Path:
        return self.scratch / f"sweep-{self.stage}-index.json"

    def _resume(self, files: FileBuffer) -> int:
        """The last layer that an interrupted sweep of the same candidates finished; 0 where its files are damaged."""
        try:
            record = json.loads(self._index.read_text(encoding="utf-8"))
            done, checksum, found = (record["done"][n] for n in ("layer", "checksum", "fvu_eval"))
            is_ours = record["check"] == self._check(record["done"]) and files.holds(done, checksum)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            is_ours = False
        if not is_ours:
            self._index.unlink(missing_ok=True)  # what it speaks of is about to be overwritten
            return 0
        self.losses.fvu_eval = found
        return int(done)

    def _check(self, done: object) -> int:
        """A checksum over what the index says and over what belongs to this sweep."""
        return zlib.crc32(json.dumps([self.key, done], sort_keys=True).encode())

    def _advance(self, layer: int) -> None:
        begun = [c for c in self._now if c.reference.layer < layer]
        starting = [c for c in self._now if c.reference.layer == layer]
        self._held.clear()
        try:
            with self._carried.turn(layer), self.model.block(layer) as module:
                self._carry(begun, layer, module)
                self._begin(starting, layer, module)
            if isinstance(self._carried, FileBuffer):
                done = {"layer": layer, "checksum": self._carried.checksum, "fvu_eval": self.losses.fvu_eval}
                durable.write_text(self._index, json.dumps({"done": done, "check": self._check(done)}))
        except OSError:
            self._clear()  # a full disk: give back what was taken of it
            raise

    def _clear(self) -> None:
        self._carried.clear()
        self._index.unlink(missing_ok=True)

    def _rows(self, candidate: Candidate) -> range:
        """The sequences that a candidate is measured on, counted from the first of `select`."""
        if candidate.eval_stride == 1 and candidate.on_select:
            return range(self.n_rows)
        return range(self.n_select, self.n_rows, candidate.eval_stride)

    def _batches(self, candidate: Candidate) -> Iterator[range]:
        rows = self._rows(candidate)
        for at in range(0, len(rows), self.batch_size):
            yield rows[at : at + self.batch_size]

    def _carry(self, begun: Sequence[Candidate], layer: int, module: nn.Module) -> None:
        """Move candidates' states through the trained block; a span that reaches further is passed on as it is."""
        changed = {c: self._in_place(c, layer, module) for c in begun if _changes(c, layer)}

        def stored() -> Iterator[tuple[Candidate, range, Tensor]]:
            for candidate in begun:
                for rows in self._batches(candidate):
                    yield candidate, rows, self._carried.read(len(rows))

        def moved(item: tuple[Candidate, range, Tensor]) -> Tensor:
            candidate, rows, hidden = item
            if candidate in changed and changed[candidate] is None:
                return hidden
            block = changed.get(candidate) or module
            return self.model.run_block(layer, block, hidden.to(self.model.device), self.ids[_slice(rows)])

        for hidden in in_parallel(moved, stored(), at_once=self.model.runs_at_once(layer)):
            self._carried.write(hidden)

    def _begin(self, starting: Sequence[Candidate], layer: int, module: nn.Module) -> None:
        """Put candidates in place of their layer and note how much of the update each leaves unexplained."""

        def placed() -> Iterator[_Start]:
            for candidate in starting:
                block = self._in_place(candidate, layer, module)
                for rows in self._batches(candidate):
                    yield _Start(
                        candidate,
                        rows,
                        block,
                        self._trained(layer - 1, rows),
                        self._trained(candidate.reference.target, rows),
                    )

        def moved(item: _Start) -> tuple[_Start, Tensor, float, float]:
            hidden = item.before
            if item.block is not None:
                hidden = self.model.run_block(layer, item.block, hidden, self.ids[_slice(item.rows)])
            on_eval = slice(max(0, self.n_select - item.rows.start), None)
            before, after = item.before[on_eval].double(), item.after.to(hidden)[on_eval].double()
            error = float((hidden[on_eval].double() - after).square().sum())
            return item, hidden, error, float((after - before).square().sum())

        sums = {candidate.reference.key: [0.0, 0.0] for candidate in starting}
        at_once = self.model.runs_at_once(layer)
        for item, hidden, error, update in in_parallel(moved, placed(), at_once=at_once):
            self._carried.write(hidden)
            so_far = sums[item.candidate.reference.key]
            so_far[0], so_far[1] = so_far[0] + error, so_far[1] + update
        aiming = [
            c.reference.key for c in starting if not c.reference.is_exchange
        ]  # that one aims at no state
        self.losses.fvu_eval |= {key: sums[key][0] / max(sums[key][1], 1e-30) for key in aiming}

    def _in_place(self, candidate: Candidate, layer: int, module: nn.Module) -> nn.Module | None:
        """The block with what the candidate has there, a module of its own; None where the block is left out whole."""
        put_here = candidate.reference.weights_at(layer)
        dropped = put_here.sublayers if isinstance(put_here, Dropped) else ()
        if isinstance(put_here, Dropped) and put_here.is_block:
            return None
        block = same_weights(module)
        if candidate.replacement:
            trained = dict(module.named_parameters())
            put_in_place(block, candidate.replacement(layer).weights(next(module.parameters()), trained))
        for sublayer in self.model.sublayers(layer):
            if sublayer.name in dropped:
                silence(block, sublayer)
        return block

    def _trained(self, layer: int, rows: range) -> Tensor:
        """O_layer of `rows`, counted from the first sequence of `select`."""
        if self.n_rows * self._row_nbytes > _HELD_NBYTES and not self._on_device:
            absolute = slice(rows.start + self.rows.start, rows[-1] + 1 + self.rows.start, rows.step)
            states = self.acts.states(layer, absolute)
        else:
            if layer not in self._held:
                states = self.acts.states(layer, self.rows)
                self._held[layer] = states.to(self.model.device) if self._on_device else states
            states = self._held[layer][_slice(rows)]
        return states.to(self.model.device, self.model.dtype)

    # -- the loss -------------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """NLL of every candidate and its divergence from the trained model, sequence by sequence."""
        for candidate in self._now:
            count = len(self._rows(candidate))
            self.losses.nll[candidate.reference.key] = np.zeros(count)
            self.losses.kl[candidate.reference.key] = np.zeros(count)
        if not self._now:
            return
        device, last = self.model.device, self.model.num_layers
        step = head_batch(self.ids.shape[1], self.model.vocab_size, device)

        def reached() -> Iterator[_End]:
            for at in range(0, self.n_rows, step):
                chunk = range(at, min(at + step, self.n_rows))
                ids = self.ids[_slice(chunk)]
                trained = self._trained(last, chunk)
                _, log_p = token_losses(self.model.logits(trained, ids), ids)
                p = log_p.exp()
                first = 0  # row at which a candidate's states begin
                for candidate in self._now:
                    every = self._rows(candidate)
                    place = slice(bisect_left(every, chunk.start), bisect_left(every, chunk.stop))
                    rows = every[place]
                    if rows:
                        hidden = self._carried.at(last, first + place.start, len(rows)).to(device)
                        inside = slice(rows.start - at, rows.stop - at, rows.step)
                        own = self.ids[_slice(rows)]
                        yield _End(candidate, place, own, hidden, p[inside], log_p[inside])
                    first += len(every)

        def measured(item: _End) -> tuple[_End, Tensor, Tensor]:
            nll, log_q = token_losses(self.model.logits(item.hidden, item.ids), item.ids)
            kl = -log_q.sub_(item.log_p).mul_(item.p).sum(-1)  # in place: as much memory again is slow
            return item, nll.cpu(), kl.double().mean(1).cpu()

        at_once = self.model.heads_at_once(step * self.ids.shape[1])
        for item, nll, kl in in_parallel(measured, reached(), at_once=at_once):
            key = item.candidate.reference.key
            self.losses.nll[key][item.place] = nll.numpy()
            self.losses.kl[key][item.place] = kl.numpy()
