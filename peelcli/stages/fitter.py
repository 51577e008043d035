"""The second stage: fit the references of every layer, then measure them all in one sweep.

A generator of progress; it prints nothing. Each layer's references are written as a part when they are done, so a
killed run goes on from the last finished layer; the parts become one file at the end.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.weights import BlockWeights
from peelcli.config import FitConfig, parse_duration, parse_layers
from peelcli.config.schemes import check_scheme, granularity_of
from peelcli.errors import CheckpointChangedError
from peelcli.fitting.block import ModelBlock
from peelcli.fitting.cached_states import CachedStates, StateData
from peelcli.fitting.fit_to_loss import CHALLENGE_BATCH, CHALLENGE_RATE, LossFitter, is_damaged
from peelcli.fitting.fit_to_loss import KINDS as END_TO_END
from peelcli.fitting.paths import PeelTask, WantedMaps, run_peeling, wanted_maps
from peelcli.quant.schemes import scheme_named
from peelcli.records import WITHOUT_WEIGHTS, FitOutcome, Paths, Reference, Run, Score, run_from
from peelcli.records.progress import Progress
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.catalogue import references_of
from peelcli.references.exchange import exchanged
from peelcli.references.interface import Budget, Replacement
from peelcli.references.peeled_block import residual_maps
from peelcli.references.plan import ALL_PAIRS, BIT_WIDTH_SWEEP, Origin, Plan, default_scheme
from peelcli.references.refine import Refinement
from peelcli.references.regression import fit_regression, step_sizes
from peelcli.references.rollback import roll_back
from peelcli.runtime.batch_sizes import block_batch, fit_batch
from peelcli.runtime.workers import in_parallel
from peelcli.scoring.sweep import Candidate, Losses
from peelcli.scoring.two_stage import part_stride, run_measurement
from peelcli.storage.activations import ActivationFile, require_space
from peelcli.storage.fit_writer import write_fit
from peelcli.storage.parts import load_weights, part_is_whole, read_part, write_part
from peelcli.storage.path_parts import PathParts
from peelcli.verdict.policy import Policy

FRESH_STEPS = 2  # times the steps: from random weights the way is longer
BRIEF_STEPS = 8  # a fit of fewer is finished with the last matrix alone, once
SWEEP_SHARE = 4  # the ladder only orders schemes: one part in so many of the steps…
ROUNDED_BITS = 4  # …and none from so many bits on, where rounding with the best scale leaves little to gain
NOT_FITTED = FitOutcome("none", 0, True, "nothing to fit")


def own_granularity(quantized: Mapping[str, Any] | None) -> str:
    """`tensor` where each matrix that the checkpoint runs in few bits has one scale, else `channel`.

    quantized: what its extraction says of them. With a scale a channel a reference would be richer than the layer.
    """
    modules = quantized["modules"] if quantized else ()
    return "tensor" if modules and all(m["granularity"] == "tensor" for m in modules) else "channel"


def _spec_of(s: FitConfig, scheme: str, least_bits: float, own: str) -> QuantSpec:
    """How references are quantised, as the settings say.

    own: the granularity of the checkpoint itself. It holds where nothing is said and a layer has no more bits.
    """
    asked = s.granularity
    if s.group_size is None and least_bits <= scheme_named(scheme).num_bits:
        asked = asked or own
    return QuantSpec(scheme, s.group_size, granularity_of(asked, s.group_size), s.scale, s.symmetric)


def _pairs(model: BlockwiseModel) -> frozenset[tuple[int, int]]:
    """The pairs of layers whose parameters have the same names and shapes: of neighbours, where there are many."""
    farthest = model.num_layers if model.num_layers <= ALL_PAIRS else 1
    return frozenset(
        (n, m)
        for n in range(1, model.num_layers)
        for m in range(n + 1, min(n + farthest, model.num_layers) + 1)
        if model.is_alike(n, m)
    )


@dataclass(frozen=True)
class PreviousCheckpoint:
    """An earlier checkpoint of the run: what a plan needs to know of it, and how to get at its blocks."""

    origin: Origin
    open: Callable[..., BlockWeights]  # given the `dtype` that they are to run in


@dataclass(frozen=True)
class FitTask:
    """What to fit, from which states, into which file."""

    output: Path
    settings: FitConfig
    config: dict[str, Any]
    resume: bool = True
    earlier: tuple[PreviousCheckpoint, ...] = ()  # oldest first


class Fitter:
    """One fit of one activation file; iterate over `run()`, which ends with the file written."""

    def __init__(self, model: BlockwiseModel, acts: ActivationFile, task: FitTask) -> None:
        """`acts` must have been extracted from `model`."""
        self.model, self.acts, self.task = model, acts, task
        self.settings = task.settings
        s = task.settings
        check_scheme(s.scheme, s.granularity, s.group_size, s.scale, s.symmetric)
        about = acts.about
        layers = parse_layers(self.settings.layers, model.num_layers)
        if self.settings.layers is None:
            layers = tuple(about["layers"])
        bits = [about["layer_bits"][n - 1] for n in layers]
        self.own_granularity = own_granularity(about["quantized"])
        spec = _spec_of(
            s, s.scheme or default_scheme(bits), min(bits, default=math.inf), self.own_granularity
        )
        self.plan = Plan(
            num_layers=model.num_layers,
            layers=layers,
            kinds=tuple(self.settings.references),
            spec=spec,
            sublayers=frozenset(n for n in layers if model.sublayers(n)),
            layer_bits=dict(enumerate(about["layer_bits"], start=1)),
            exchangeable=_pairs(model),
            is_damaged=is_damaged(model, acts),
            ladder=BIT_WIDTH_SWEEP if self.settings.ladder else (),
            origins=tuple(earlier.origin for earlier in task.earlier),
            layer_hashes={int(layer): digest for layer, digest in about["layer_hashes"].items()},
        )
        self.skipped: list[str] = list(about["skipped"])
        self.parts_dir = task.output.with_name(task.output.name + ".parts")
        self._key = json.dumps([about, task.config], sort_keys=True)
        self._parts: dict[str, Path] = {}  # reference key → the file that holds its weights
        self._outcomes: dict[Reference, FitOutcome] = {}
        self._residual: dict[int, frozenset[str]] = {}
        self._held = CachedStates(acts, model.device, model.dtype)
        self.asked = self._asked()
        self._began = 0.0

    def run(self) -> Iterator[Progress]:
        """Fit, score and write `task.output`; yields as it goes."""
        self._began = time.perf_counter()
        if not self.task.resume:
            shutil.rmtree(self.parts_dir, ignore_errors=True)
        self.parts_dir.mkdir(parents=True, exist_ok=True)
        try:
            yield from self._run()
        except CheckpointChangedError:
            shutil.rmtree(self.parts_dir)
            raise

    def _run(self) -> Iterator[Progress]:
        yield from self._roll_back()
        yield from self._fit_layers()
        yield from self._fit_end_to_end()
        candidates = [self._candidate(r) for r in self._outcomes]
        losses = yield from run_measurement(
            self.model,
            self.acts,
            candidates,
            self.parts_dir,
            key=self._key,
            batch_size=self.settings.batch_size or block_batch(self.acts.ids.shape[1], self.model.device),
            screen=self.settings.screen,
            policy=Policy(matched_margin=self.settings.matched_margin),
        )
        peeled = yield from self._peel_paths()
        ids = self.acts.ids[self.acts.rows["eval"]]
        run = replace(self._record(losses), paths=peeled[0] if peeled else None)
        self.model.stamp.require_unchanged()
        write_fit(self.task.output, run, ids, self._parts, peeled[1] if peeled else None)
        shutil.rmtree(self.parts_dir)

    def _candidate(self, reference: Reference) -> Candidate:
        def replacement(layer: int) -> Replacement:
            if reference.kind == "exchange":
                return exchanged(self.model.read_weights(reference.layer + reference.target - layer))
            return load_weights(self._parts[reference.key], reference, self.model.device)

        loads = None if reference.kind == "identity" else replacement
        is_ladder = reference.kind == "direct" and reference.scheme != self.plan.scheme
        stride = part_stride(self.acts) if is_ladder else 1
        # None is chosen among a layer's rescales before `eval` tests them.
        return Candidate(reference, loads, stride, on_select=reference.kind != "rescale")

    # -- blocks of earlier checkpoints --------------------------------------------------------------------------------

    def _roll_back(self) -> Iterator[Progress]:
        """Keep the older blocks as witnesses; of the earlier checkpoints one is open at a time, and one block of it."""
        wanted = [r for n in self.plan.layers for r in references_of(n, self.plan) if r.kind == "rollback"]
        paths = {r: self.parts_dir / f"{r.key}.h5" for r in wanted}
        pending = [r for r in wanted if not part_is_whole(paths[r], self._key)]
        # Once in their parts, and once more in the finished file.
        nbytes = sum(self.model.block_nbytes(r.layer) for r in (*wanted, *pending))
        require_space(self.parts_dir, nbytes, "keeping the blocks of earlier checkpoints (rollback)")
        done = 0
        for earlier in self.task.earlier:
            weights: BlockWeights | None = None
            for reference in [r for r in pending if r.origin_id == earlier.origin.id]:
                yield Progress("rollback", done, len(pending), f"layer {reference.layer}")
                weights = weights or earlier.open(dtype=self.model.dtype)
                older = roll_back(weights.read(reference.layer))
                write_part(paths[reference], self._key, {reference: older})
                done += 1
        for path in paths.values():
            self._take(path)
        if pending:
            yield Progress("rollback", len(pending), len(pending), "all layers")

    # -- references fitted to states ------------------------------------------------------------------------------

    def _fit_layers(self) -> Iterator[Progress]:
        for done, layer in enumerate(self.plan.layers):
            yield Progress("fit", done, len(self.plan.layers), f"layer {layer}")
            later = ("rollback", *END_TO_END)
            wanted = [r for r in references_of(layer, self.plan) if r.kind not in later]
            self._outcomes |= {r: NOT_FITTED for r in wanted if r.kind in WITHOUT_WEIGHTS}
            fitted = [r for r in wanted if r.kind not in WITHOUT_WEIGHTS]
            path = self.parts_dir / f"layer-{layer:03d}.h5"
            if not (self.task.resume and part_is_whole(path, self._key)):
                with self.model.block(layer) as module:
                    results = dict(zip(fitted, self._fit_all(fitted, layer, module), strict=True))
                write_part(path, self._key, results)
            self._take(path)
        self._held.clear()
        yield Progress("fit", len(self.plan.layers), len(self.plan.layers), "all layers")

    def _take(self, path: Path) -> None:
        for reference, outcome in read_part(path).items():
            self._outcomes[reference] = outcome
            self._parts[reference.key] = path

    def _fit_all(
        self, references: Sequence[Reference], layer: int, module: nn.Module
    ) -> Iterator[tuple[Replacement, FitOutcome]]:
        """Fit the references of one layer, several at once where the block is small."""
        at_once = self.model.runs_at_once(layer)
        self._residual[layer] = self._residual_maps(layer, module)

        def one(reference: Reference) -> tuple[Replacement, FitOutcome]:
            with torch.enable_grad():
                return self._fit_one(reference, module)

        return in_parallel(one, references, at_once=at_once)

    def _residual_maps(self, layer: int, module: nn.Module) -> frozenset[str]:
        """Names of the matrices of a block that write to the residual stream."""
        few = self._data("fit", layer, layer).batch(range(1))
        return frozenset(
            m.name for m in residual_maps(ModelBlock(self.model, layer, module), few.inputs, few.ids)
        )

    def _fit_one(self, reference: Reference, module: nn.Module) -> tuple[Replacement, FitOutcome]:
        layer = reference.layer
        block = ModelBlock(self.model, layer, module, reference.sublayer)
        scheme = scheme_named(reference.scheme or "fp")
        fit, select = (self._data(p, layer, reference.target) for p in ("fit", "select"))
        start = self.plan.start(layer, scheme.name, self.settings.start, scheme.num_bits)
        steps = self.settings.direct_steps
        if scheme.name != self.plan.scheme:
            steps = steps // SWEEP_SHARE if scheme.num_bits < ROUNDED_BITS else 0
        steps *= FRESH_STEPS if start == "fresh" else 1
        # What a layer is judged by first, and what its report quotes: a whole block of the run's scheme.
        is_block = reference.kind == "direct" and not reference.sublayer
        closely = is_block and scheme.name == self.plan.scheme and start != "fresh"
        batch = fit_batch(self.model.device, closely=closely)
        sizes = step_sizes(scheme, start, closely=closely)
        if self.settings.learning_rate:
            sizes = sizes | {"learning_rate": self.settings.learning_rate}
        budget = Budget(steps, batch_size=batch, seed=self.settings.seed, start=start, **sizes)
        residual = [m for m in block.maps if m.name in self._residual[layer]] if steps else []
        rounds = 0 if steps < BRIEF_STEPS else 1 + closely
        finish = Refinement(block, residual, fit, budget.batch_size, rounds=rounds)
        spec = self.plan.spec
        if scheme.name != spec.scheme:  # the ladder only orders schemes
            spec = QuantSpec(scheme.name, spec.group_size, spec.granularity)
        return fit_regression(block, block.maps, spec, fit, select, budget, finish)

    def _data(self, part: str, layer: int, target: int) -> StateData:
        return StateData(self._held, part, layer - 1, target)

    # -- references fitted by the loss of the whole network -----------------------------------------------------------

    def _fit_end_to_end(self) -> Iterator[Progress]:
        wanted = [r for n in self.plan.layers for r in references_of(n, self.plan) if r.kind in END_TO_END]
        if not wanted:
            return
        first = min(self.plan.layers)
        fits = LossFitter(self.model, self.acts, first, self.settings.seed, self.own_granularity)
        reason = fits.why_not(is_damaged=self.plan.is_damaged)
        if reason:
            kinds = " and ".join(dict.fromkeys(r.kind for r in wanted))
            self.skipped.append(f"{kinds} references: {reason}")
            return
        with fits.open():
            yield from self._challenge_layers(fits, {r.layer: r for r in wanted if r.kind == "challenge"})
            rescales = [r for r in wanted if r.kind == "rescale"]
            path = self.parts_dir / "rescale.h5"
            if rescales and not (self.task.resume and part_is_whole(path, self._key)):
                yield Progress("rescale", 0, 1, "all layers")
                write_part(path, self._key, fits.rescale(rescales))
            if rescales:
                self._take(path)
                yield Progress("rescale", 1, 1, "all layers")

    def _challenge_layers(self, fits: LossFitter, references: Mapping[int, Reference]) -> Iterator[Progress]:
        def budget(at_once: bool) -> Budget:
            rate = self.settings.learning_rate or CHALLENGE_RATE
            steps, seed = self.settings.challenge_steps, self.settings.seed
            return Budget(steps, rate, CHALLENGE_BATCH, seed, "warm", at_once=at_once)

        for done, (layer, reference) in enumerate(references.items()):
            yield Progress("challenge", done, len(references), f"layer {layer}")
            path = self.parts_dir / f"challenge-{layer:03d}.h5"
            if not (self.task.resume and part_is_whole(path, self._key)):
                write_part(path, self._key, {reference: fits.challenge(layer, budget)})
            self._take(path)
        if references:
            yield Progress("challenge", len(references), len(references), "all layers")

    # -- the whole network, peeled ------------------------------------------------------------------------------------

    def _asked(self) -> WantedMaps:
        budget = parse_duration(self.settings.budget) if self.settings.budget else math.inf
        return wanted_maps(self.settings.paths, self.model.num_layers, budget)

    def _peel_paths(self) -> Generator[Progress, None, tuple[Paths, PathParts] | None]:
        if not (self.asked.maps or self.asked.search):
            return None
        if set(self.acts.stored) != set(range(self.model.num_layers + 1)):
            self.skipped.append(
                "peeled paths: they need the states of every layer, and --layers leaves some out"
            )
            return None
        grids = [g or ("fp", None) for g in self.acts.about["layer_grids"]]
        task = PeelTask(
            parts_dir=self.parts_dir,
            key=self._key,
            start="fresh" if self.settings.start == "fresh" else "warm",
            specs=tuple(QuantSpec(scheme, size, self.own_granularity) for scheme, size in grids),
            block_steps=self.settings.path_steps,
            head_steps=self.settings.head_steps,
            seed=self.settings.seed,
            resume=self.task.resume,
        )
        return (yield from run_peeling(self.model, self.acts, task, self.asked))

    # -- the record ---------------------------------------------------------------------------------------------------

    def _record(self, measured: Losses) -> Run:
        rows = self.acts.rows
        n_select = rows["select"].stop - rows["select"].start
        n_rows = rows["eval"].stop - rows["select"].start
        about = self.acts.about

        def losses(array: np.ndarray, part: str) -> tuple[float, ...]:
            if len(array) < n_rows:  # measured on `eval` alone, or on some of it
                return tuple(array.tolist()) if part == "eval" else ()
            return tuple(array[:n_select].tolist() if part == "select" else array[n_select:].tolist())

        scores = []
        for reference, outcome in self._outcomes.items():
            nll, kl = measured.nll[reference.key], measured.kl[reference.key]
            outcome = replace(outcome, fvu_eval=measured.fvu_eval.get(reference.key))
            scores.append(
                Score(reference, outcome, losses(nll, "select"), losses(nll, "eval"), losses(kl, "eval"))
            )
        return run_from(
            about,
            config=self.task.config,
            layers=self.plan.layers,
            scheme=self.plan.scheme,
            group_size=self.plan.spec.group_size,
            granularity=self.plan.spec.granularity,
            symmetric=self.plan.spec.symmetric,
            skipped=tuple(self.skipped),
            nll_select=tuple(self.acts.nll[rows["select"]].tolist()),
            nll_eval=tuple(self.acts.nll[rows["eval"]].tolist()),
            entropy_eval=tuple(self.acts.entropy[rows["eval"]].tolist()),
            scores=tuple(scores),
            seconds=round(time.perf_counter() - self._began, 3),
        )
