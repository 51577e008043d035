"""The stage: which maps are asked for, peeled within a budget of time, and what of them is kept.

A generator of progress; it prints nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.fitting.paths.block_fit import BlockFit, PeelTask, States
from peelcli.fitting.target_maps import (
    NAMED,
    BlockState,
    FittedPath,
    TargetMap,
    all_maps,
    best_map,
    check_map,
    count_fits,
    named_map,
    peel,
    promising_maps,
    segments,
)
from peelcli.fitting.target_maps.search import Segment
from peelcli.records import Paths, Reference
from peelcli.records.progress import Progress
from peelcli.runtime.batch_sizes import block_batch
from peelcli.scoring.sweep import Candidate, Sweep
from peelcli.storage.activations import ActivationFile
from peelcli.storage.path_parts import PathParts

# Blocks that a search may fit in peeling what it has found, for each segment that it has scored.
FITS_PER_SEGMENT = 1.5


@dataclass(frozen=True)
class WantedMaps:
    """What is to be peeled: maps in the order of their importance, then those that a search finds."""

    maps: tuple[TargetMap, ...]
    search: bool = False
    budget: float = math.inf  # seconds


def wanted_maps(names: Sequence[str], num_layers: int, budget: float = math.inf) -> WantedMaps:
    """The maps that settings such as ("last", "[1,3,3]", "search") name. Raises UsageError for one that is none."""
    maps: list[TargetMap] = []
    for name in names:
        if name.startswith("["):
            maps.append(check_map([int(n) for n in name.strip("[] ").split(",")], num_layers))
        elif name == "all":
            maps += all_maps(num_layers)
        elif name == "search":  # what it finds is set beside the named ones
            maps += [named_map(known, num_layers) for known in NAMED]
        elif name != "none":
            maps.append(named_map(name, num_layers))
    return WantedMaps(tuple(dict.fromkeys(maps)), "search" in names, budget)


def run_peeling(
    model: BlockwiseModel, acts: ActivationFile, task: PeelTask, asked: WantedMaps
) -> Generator[Progress, None, tuple[Paths, PathParts]]:
    """Peel what is asked for, the head control always; the record, and the parts of what it rests on.

    `acts` must hold the states of every layer.
    """
    return (yield from _Stage(model, acts, task, asked).run())


class _Stage:
    def __init__(
        self, model: BlockwiseModel, acts: ActivationFile, task: PeelTask, asked: WantedMaps
    ) -> None:
        self.model, self.acts, self.task, self.asked = model, acts, task, asked
        self.fit = BlockFit(model, acts, task)
        self.began = time.monotonic()
        self.longest = 0.0  # seconds of the longest fit so far: what the next one may take
        self.done, self.total = 0, 1 + count_fits(asked.maps)
        self.left_out: list[str] = []

    def run(self) -> Generator[Progress, None, tuple[Paths, PathParts]]:
        yield self._progress("head control")
        self._timed(self.fit.control)
        self.done += 1
        yield from self._peel(self.asked.maps)
        if self.asked.search:
            yield from self._search()
        yield Progress("paths", self.total, self.total, "all maps")
        return self._result()

    # -- the budget -------------------------------------------------------------------------------------------------

    @property
    def _spent(self) -> bool:
        """Whether another fit would overrun the budget."""
        return time.monotonic() - self.began + self.longest > self.asked.budget

    def _timed(self, call: object, *args: object) -> object:
        began = time.monotonic()
        result = call(*args)  # type: ignore[operator]
        self.longest = max(self.longest, time.monotonic() - began)
        return result

    def _progress(self, detail: str) -> Progress:
        return Progress("paths", min(self.done, self.total), self.total, detail)

    # -- maps ---------------------------------------------------------------------------------------------------------

    def _peel(self, maps: Iterable[TargetMap]) -> Generator[Progress, None, None]:
        """Peel the maps, as far as the budget reaches."""
        wanted = list(maps)
        walk = peel(self.fit, self.fit.start(), wanted)
        while not (self._spent and wanted):
            event = self._timed(next, walk, None)
            if event is None:
                return
            if isinstance(event, BlockState):
                self.done += 1
                yield self._progress(f"map {list(event.prefix)}")
            elif isinstance(event, FittedPath):
                wanted.remove(event.target_map)
        self.left_out += [f"map {list(m)}: the budget was spent" for m in wanted]

    # -- the search ---------------------------------------------------------------------------------------------------

    def _search(self) -> Generator[Progress, None, None]:
        num_layers = self.model.num_layers
        wanted = segments(num_layers)
        self.total = self.done + len(wanted)
        costs = yield from self._score_segments(wanted)
        if len(costs) < len(wanted):
            self.left_out.append(
                f"search: the budget was spent after {len(costs)} of {len(wanted)} segments; maps with the others were "
                "not looked for"
            )
        known = set(self.fit.scores)
        fits, limit = count_fits(known - {()}), FITS_PER_SEGMENT * len(wanted)
        chosen: list[TargetMap] = []
        found = promising_maps(costs, num_layers, len(wanted))
        for target_map in (m for m in found if m not in known):
            if count_fits([*(known - {()}), *chosen, target_map]) > max(limit, fits):
                break
            chosen.append(target_map)
        self.total = self.done + count_fits([*(known - {()}), *chosen]) - fits
        yield from self._peel(chosen)
        total = 2 ** (num_layers - 1)
        peeled = len(self.fit.scores) - 1
        if peeled < total:
            self.left_out.append(
                f"search: {total - peeled} of {total} maps, less promising by their segments' costs"
            )

    def _score_segments(self, wanted: Sequence[Segment]) -> Generator[Progress, None, dict[Segment, float]]:
        """What each segment costs the loss on `select` where one block does its work, in nats per token."""
        parts: dict[Segment, tuple[Reference, Path]] = {}
        inputs = None
        for start, end in wanted:
            if self._spent:
                break
            if inputs is None or inputs[0] != start:
                prepared = self.fit.prepare(States((), self.fit.trained(start)))
                inputs = (start, prepared)
            parts[(start, end)] = self._timed(self.fit.score_segment, inputs[1], start + 1, end)  # type: ignore[assignment]
            self.done += 1
            yield self._progress(f"segment {start + 1}-{end}")
        candidates = [
            Candidate(reference, lambda _, r=reference, p=part: self.fit.load(p, r))  # type: ignore[misc]
            for reference, part in parts.values()
        ]
        batch = block_batch(self.acts.ids.shape[1], self.model.device)
        key = f"{self.task.key}segments"
        sweep = Sweep(self.model, self.acts, candidates, self.task.parts_dir, key=key, batch_size=batch)
        for event in sweep.run():
            yield self._progress(f"segments, {event.detail}")
        rows = self.acts.rows["select"]
        trained = float(np.mean(self.acts.nll[rows]))
        count = rows.stop - rows.start
        return {
            segment: float(np.mean(sweep.losses.nll[reference.key][:count])) - trained
            for segment, (reference, _) in parts.items()
        }

    # -- the result ---------------------------------------------------------------------------------------------------

    def _result(self) -> tuple[Paths, PathParts]:
        fit, num_layers = self.fit, self.model.num_layers
        scores = {m: s for m, s in fit.scores.items() if m}
        kept: set[TargetMap] = set()
        if scores:
            kept.add(best_map({m: float(np.mean(s.nll_select)) for m, s in scores.items()}))
            kept |= {named_map("last", num_layers)} & set(scores)
        record = Paths(
            control=fit.scores[()],
            scores=tuple(scores.values()),
            schemes=tuple(spec.scheme for spec in self.task.specs),
            left_out=tuple(self.left_out),
            num_fits=fit.num_fits,
            seconds=round(time.monotonic() - self.began, 3),
        )
        prefixes = {m[:n] for m in kept for n in range(1, num_layers + 1)}
        return record, PathParts(fit.maps, {p: fit.blocks[p] for p in prefixes})
