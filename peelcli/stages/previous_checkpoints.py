"""The earlier checkpoints of a run, whose blocks may stand in for those of the one that is audited (`rollback`)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path

from peelcli.checkpoint.training_step import training_step
from peelcli.checkpoint.weights import block_shapes, open_weights
from peelcli.config import FitConfig
from peelcli.records.progress import Progress
from peelcli.references.plan import Origin
from peelcli.stages.fitter import PreviousCheckpoint
from peelcli.stages.inspection import Inspection, open_and_scan
from peelcli.stages.workspace import Workspace


def open_earlier(
    opened: Inspection, paths: Sequence[Path], settings: FitConfig, workspace: Workspace
) -> Generator[Progress, None, list[Inspection]]:
    """Scan the earlier checkpoints of a run, where `rollback` is asked for: those of other weights, each once."""
    found: dict[str, Inspection] = {}
    for path in paths if "rollback" in settings.references else ():
        other = yield from open_and_scan(path, workspace.of_other(path), opened.trained)
        found.pop(other.scan.checkpoint_id, None)  # of two that are the same the later one is named
        found[other.scan.checkpoint_id] = other
    found.pop(opened.scan.checkpoint_id, None)
    return list(found.values())


def why_not_rolled_back(opened: Inspection, other: Inspection) -> str | None:
    """How the blocks of two checkpoints differ in number, names or shapes; None where those of one fit the other."""
    if opened.files.config == other.files.config:
        return None
    ours, theirs = block_shapes(opened.path), block_shapes(other.path)
    if len(ours) != len(theirs):
        return f"{other.path} has {len(theirs)} layers, and {opened.path} has {len(ours)}"
    for layer, (mine, its) in enumerate(zip(ours, theirs, strict=True), start=1):
        for name in sorted({*mine, *its}):
            if mine.get(name) != its.get(name):
                here, there = (list(s[name]) if name in s else "absent" for s in (mine, its))
                return f"{name!r} of layer {layer} is {there} in {other.path}, and {here} in {opened.path}"
    return None


def earlier_of(other: Inspection, workspace: Workspace) -> PreviousCheckpoint:
    """What a fit needs of an earlier checkpoint; workspace: of the one that is audited."""
    non_finite = frozenset(f.layer for f in other.scan.findings if f.is_non_finite and f.layer)
    origin = Origin(
        other.scan.checkpoint_id[:12], training_step(other.path), other.scan.layer_hashes, non_finite
    )
    offload, running = workspace.of_other(other.path).offload, other.precision.running
    weights = partial(open_weights, other.path, offload_dir=offload, running=running, stamp=other.stamp)
    return PreviousCheckpoint(origin, weights)
