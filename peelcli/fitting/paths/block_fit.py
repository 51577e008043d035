"""Peel the paths of a checkpoint: blocks fitted from the bottom to the states that target maps name, a head on top.

    Z_0 = O_0;  Z_l = B_θ(Z_{l−1}) with θ fitted so that Z_l ≈ O_{π(l)};  bound = CE of a light head on Z_K

("Trust, but Verify", arXiv 2605.02853; the walk over the maps is `paths.peel`.) A generator of progress; it prints
nothing. Each block and each finished map is a part of its own as soon as it is done: a killed run goes on from there,
and a second walk finds what the first has fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.fitting.block import ModelBlock
from peelcli.fitting.cached_states import CachedStates, StateData
from peelcli.fitting.target_maps import TargetMap
from peelcli.quant.schemes import scheme_named
from peelcli.records import FitOutcome, PathScore, Reference
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.head import fit_head
from peelcli.references.interface import Budget, LinearMap, Replacement
from peelcli.references.micro_batches import MICRO_BATCH
from peelcli.references.peeled_block import BlockStarts, fit_block, residual_maps, start_weights
from peelcli.references.regression import step_sizes
from peelcli.runtime.batch_sizes import block_batch, free_memory, head_batch
from peelcli.runtime.workers import in_parallel
from peelcli.scoring.losses import token_losses
from peelcli.storage.activations import ActivationFile
from peelcli.storage.parts import load_weights, part_is_whole, read_part, write_part
from peelcli.storage.path_parts import part_name, read_path_part, write_path_part

HEAD_RATE = 0.02  # relative to the size of the head's inputs
BLOCK_BATCH, HEAD_BATCH = 4, 8  # sequences a step
HELD_NBYTES = 2**28  # states up to 256 MB are held in memory, larger ones in a scratch file
ROOM_FOR = 8  # times the states must fit into what is free of an accelerator to be held there
LEFT_OVER_ROWS = 8  # sequences that are compared in double precision at once


class States(NamedTuple):
    """Z_l of the sequences of all parts, (n_seq, seq_len, d_model), and the targets of layers 1…l that led to it."""

    prefix: TargetMap
    values: Tensor


class Inputs(NamedTuple):
    """What the fits of one layer from one input share: the starts of its block, once a fit has asked for them."""

    states: States
    starts: dict[int, BlockStarts]


@dataclass(frozen=True)
class PeelTask:
    """What is peeled, and with how many steps; `key` names the fit that the parts belong to."""

    parts_dir: Path
    key: str
    start: str  # "warm" or "fresh"
    specs: tuple[QuantSpec, ...]  # of the block of each layer
    block_steps: int
    head_steps: int
    seed: int
    resume: bool = True


@dataclass(frozen=True)
class _HeadData:
    """The last states of a network, Z_K or O_K, and the ids of one part."""

    model: BlockwiseModel
    hidden: Tensor  # (n_seq, seq_len, d_model)
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @torch.no_grad()
    def losses(self, head: Tensor | None) -> Tensor:
        step = head_batch(self.ids.shape[1], self.model.vocab_size, self.model.device)

        def of(rows: slice) -> Tensor:
            hidden, ids = self.hidden[rows].to(self.model.device), self.ids[rows]
            return token_losses(self.model.logits(hidden, ids, head), ids)[0]

        rows = [slice(at, at + step) for at in range(0, len(self), step)]
        at_once = self.model.heads_at_once(step * self.ids.shape[1])
        return torch.cat(list(in_parallel(of, rows, at_once=at_once)))

    def logits(self, rows: Sequence[int], head: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.ids[list(rows)]
        return self.model.logits(self.hidden[list(rows)].to(self.model.device), ids, head), ids


class BlockFit:
    """The fit of decoder blocks that `paths.peel` takes; what it has fitted lies in the parts."""

    def __init__(self, model: BlockwiseModel, acts: ActivationFile, task: PeelTask) -> None:
        """`acts` must hold the states of every layer of `model`."""
        self.model, self.acts, self.task = model, acts, task
        self.blocks: dict[TargetMap, Path] = {}  # prefix → part
        self.maps: dict[TargetMap, Path] = {}  # finished map → part; () is the control
        self.scores: dict[TargetMap, PathScore] = {}
        self._fits: set[Path] = set()
        self._residual: dict[int, tuple[LinearMap, ...]] = {}
        self._unexplained: dict[TargetMap, float] = {}
        self._outcomes: dict[TargetMap, FitOutcome] = {}
        self._first: Tensor | None = None
        self._held = CachedStates(acts, model.device, model.dtype)

    @property
    def num_fits(self) -> int:
        """How many blocks were fitted, by this run or by the one that it resumes."""
        return len(self._fits)

    def start(self) -> States:
        """Z_0 = O_0."""
        return States((), self.trained(0))

    def prepare(self, inputs: States) -> Inputs:
        """Nothing until a fit asks for it: a part that is there needs no preparation."""
        return Inputs(inputs, {})

    def solve(self, prepared: Inputs, layer: int, target: int) -> tuple[States, Path]:
        """The block of `layer` fitted to O_target, put to work on every sequence."""
        prefix = (*prepared.states.prefix, target)
        part = self.task.parts_dir / part_name("block", prefix)
        with self.model.block(layer) as module:
            replacement, outcome = self._fitted(part, prefix, prepared, module)
            weights = replacement.weights(next(module.parameters()))
            values = self._run(ModelBlock(self.model, layer, module), prepared.states.values, weights)
        self.blocks[prefix], self._outcomes[prefix] = part, outcome
        self._unexplained[prefix] = self._left_over(values, target)
        return States(prefix, values), part

    def finish(self, prepared: Inputs) -> tuple[float, Path]:
        """The last block, and the head on top; the bound is the mean loss on `select`, which maps are chosen by."""
        last = self.model.num_layers
        states, _ = self.solve(prepared, last, last)
        prefixes = [states.prefix[:n] for n in range(1, last + 1)]
        fits = tuple(self._outcomes[p] for p in prefixes)
        score = self._with_head(states, fits, tuple(self._unexplained[p] for p in prefixes))
        return float(torch.tensor(score.nll_select, dtype=torch.float64).mean()), self.maps[states.prefix]

    def control(self) -> PathScore:
        """The head control: the trained states under a refitted head."""
        return self._with_head(States((), self.trained(self.model.num_layers)), (), ())

    def score_segment(self, prepared: Inputs, layer: int, target: int) -> tuple[Reference, Path]:
        """One block that is fitted to do the work of layers `layer`…`target` on trained inputs, and its part."""
        part = self.task.parts_dir / part_name("segment", (layer, target))
        with self.model.block(layer) as module:
            self._fitted(part, (layer, target), prepared, module, segment=True)
        (reference,) = read_part(part)
        return reference, part

    @staticmethod
    def load(part: Path, reference: Reference) -> Replacement:
        """The weights in a part."""
        return load_weights(part, reference)

    # -- one fit ----------------------------------------------------------------------------------------------------

    def _fitted(
        self, part: Path, prefix: TargetMap, prepared: Inputs, module: nn.Module, *, segment: bool = False
    ) -> tuple[Replacement, FitOutcome]:
        layer = prefix[0] if segment else len(prefix)
        spec = self.task.specs[layer - 1]
        kind = "segment" if segment else "path"
        reference = Reference(kind, layer, prefix[-1], None, *spec.grid, scheme_named(spec.scheme).num_bits)
        key = f"{self.task.key}{kind}{prefix}"
        if not (self.task.resume and part_is_whole(part, key)):
            result = self._fit(
                layer, prefix[-1], prepared, module, steps=0 if segment else self.task.block_steps
            )
            write_part(part, key, {reference: result})
        self._fits.add(part)
        return load_weights(part, reference), read_part(part)[reference]

    def _fit(
        self, layer: int, target: int, prepared: Inputs, module: nn.Module, *, steps: int
    ) -> tuple[Replacement, FitOutcome]:
        block = ModelBlock(self.model, layer, module)
        batch = block_batch(self.acts.ids.shape[1], self.model.device)
        if layer not in prepared.starts:
            if layer not in self._residual:
                few = self.acts.ids[:2]
                hidden = prepared.states.values[:2].to(self.model.device)
                self._residual[layer] = residual_maps(block, hidden, few)
            weights = start_weights(block.maps, self.task.start, self.task.seed + layer)
            prepared.starts[layer] = BlockStarts(
                self._residual[layer], weights, batch, at_once=block.runs_at_once
            )
        spec = self.task.specs[layer - 1]
        fit, select = (StateData(self._held, p, prepared.states.values, target) for p in ("fit", "select"))
        at_once, seed = block.runs_at_once, self.task.seed
        sizes = step_sizes(scheme_named(spec.scheme), "warm")
        budget = Budget(steps, batch_size=BLOCK_BATCH, seed=seed, start="warm", at_once=at_once, **sizes)
        return fit_block(block, prepared.starts[layer], spec, fit, select, budget)

    @torch.no_grad()
    def _run(self, block: ModelBlock, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        out = self._empty(block.layer)
        step = block_batch(hidden.shape[1], self.model.device)

        def moved(rows: slice) -> tuple[slice, Tensor]:
            inputs = hidden[rows].to(self.model.device)
            return rows, block(inputs, self.acts.ids[rows], weights).to(out.device)

        every = (slice(at, at + step) for at in range(0, len(hidden), step))
        for rows, values in in_parallel(moved, every, at_once=block.runs_at_once):
            out[rows] = values
        return out

    def _left_over(self, values: Tensor, target: int) -> float:
        """‖Z − O_t‖² / ‖O_t − mean‖² on `eval`."""
        rows = self.acts.rows["eval"]
        error = power = 0.0
        total = torch.zeros(values.shape[-1], dtype=torch.float64, device=values.device)
        for at in range(rows.start, rows.stop, LEFT_OVER_ROWS):
            some = slice(at, min(at + LEFT_OVER_ROWS, rows.stop))
            wanted = self.acts.states(target, some).to(values.device).double()
            error += float((values[some].double() - wanted).square().sum())
            power += float(wanted.square().sum())
            total += wanted.sum((0, 1))
        count = (rows.stop - rows.start) * values.shape[1]
        return error / max(power - float(total.square().sum()) / count, 1e-30)

    # -- states and heads ---------------------------------------------------------------------------------------------

    def trained(self, layer: int) -> Tensor:
        """O_layer of the sequences of all parts, (n_seq, seq_len, d_model)."""
        out = self._empty(-1 - layer)
        for at in range(0, len(out), 16):
            out[at : at + 16] = self.acts.states(layer, slice(at, min(at + 16, len(out)))).to(out)
        return out

    def _empty(self, slot: int) -> Tensor:
        """Room for the states of all sequences; a path holds one of each layer, so a slot's file is used again."""
        width = self.acts.states(self.acts.stored[0], slice(0, 1)).shape[-1]
        shape = (*self.acts.ids.shape, width)
        numel = math.prod(shape)
        nbytes = numel * self.model.dtype.itemsize
        if nbytes * ROOM_FOR <= free_memory(self.model.device):
            return torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        if nbytes <= HELD_NBYTES:
            return torch.empty(shape, dtype=self.model.dtype)
        path = self.task.parts_dir / f"states-{slot}.bin"
        path.unlink(missing_ok=True)  # what still maps the old file keeps it
        return torch.from_file(str(path), shared=True, size=numel, dtype=self.model.dtype).view(shape)

    def _with_head(
        self, states: States, fits: tuple[FitOutcome, ...], unexplained: tuple[float, ...]
    ) -> PathScore:
        part = self.task.parts_dir / part_name("map", states.prefix)
        key = f"{self.task.key}map{states.prefix}"
        if not (self.task.resume and part_is_whole(part, key)):
            control = self.maps.get(())
            if control and unexplained[-1:] == (0.0,):  # its states are the trained ones to the last bit
                score, head = read_path_part(control)
                score = replace(
                    score, target_map=states.prefix, fits=(*fits, *score.fits), unexplained=unexplained
                )
            else:
                data = self._head_data(states.values)
                # The control is fitted as every path is, or a path of the trained blocks themselves would pass it by.
                head, outcome = self._fit_head(data, [self._zero_head(), self._first_head()])
                nll = {p: tuple(data[p].losses(head).tolist()) for p in ("select", "eval")}
                score = PathScore(states.prefix, (*fits, outcome), unexplained, nll["select"], nll["eval"])
            write_path_part(part, key, score, head)
        score, _ = read_path_part(part)
        self.maps[states.prefix], self.scores[states.prefix] = part, score
        return score

    def _first_head(self) -> Tensor:
        """A head fitted to the trained states, which all heads may start from."""
        if self._first is None:
            part = self.task.parts_dir / "first-head.h5"
            key = f"{self.task.key}first"
            if not (self.task.resume and part_is_whole(part, key)):
                data = self._head_data(self.trained(self.model.num_layers))
                head, outcome = self._fit_head(data, [self._zero_head()])
                write_path_part(part, key, PathScore((), (outcome,), (), (), ()), head)
            self._first = read_path_part(part)[1].to(self.model.device)
        return self._first

    def _zero_head(self) -> Tensor:
        width = self.model.head_width
        return torch.zeros(width, width, device=self.model.device)

    def _head_data(self, values: Tensor) -> dict[str, _HeadData]:
        rows = self.acts.rows.items()
        return {p: _HeadData(self.model, values[r], self.acts.ids[r]) for p, r in rows}

    def _fit_head(self, data: Mapping[str, _HeadData], starts: Sequence[Tensor]) -> tuple[Tensor, FitOutcome]:
        most = 2**25 // (self.acts.ids.shape[1] * self.model.vocab_size)  # logits of 128 MB
        batch = max(1, min(HEAD_BATCH, most))
        at_once = self.model.heads_at_once(self.acts.ids[:MICRO_BATCH].numel())
        budget = Budget(self.task.head_steps, HEAD_RATE, batch, self.task.seed, "warm", at_once=at_once)
        return fit_head(data["fit"], data["select"], starts, budget)
