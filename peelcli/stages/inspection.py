"""A checkpoint whose files have been looked at, and of which nothing has been built or run yet."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

from peelcli.checkpoint.files import CheckpointFiles, open_checkpoint, require_decoder_only
from peelcli.checkpoint.other_files import other_files
from peelcli.checkpoint.scan import ScanResult, run_scan
from peelcli.checkpoint.stamp import UNSTAMPED, Stamp
from peelcli.config import TrainedSchemeConfig
from peelcli.records.progress import Progress
from peelcli.stages.precision import PLAIN, Precision, precision_of
from peelcli.stages.workspace import Workspace


@dataclass(frozen=True)
class Inspection:
    """A checkpoint whose files are complete and have been scanned."""

    path: Path
    files: CheckpointFiles
    scan: ScanResult
    precision: Precision = PLAIN  # that its weights run in
    trained: TrainedSchemeConfig | None = None  # what the user said of that
    stamp: Stamp = UNSTAMPED  # how its files were found, before any of them was read

    @property
    def is_finite(self) -> bool:
        """Whether every weight is."""
        return not any(f.is_non_finite for f in self.scan.findings)

    @property
    def stored_bits(self) -> float:
        """Bits per element that most of the weights are stored in; packed ones are not counted."""
        packing = self.precision.running.packing
        packed = packing.consumed if packing is not None else frozenset()
        sizes: dict[float, int] = {}
        for info in self.files.tensors.values():
            if info.name in packed:
                continue
            bits = 8.0 * info.nbytes / max(1, info.numel)
            sizes[bits] = sizes.get(bits, 0) + info.numel
        return max(sizes, key=lambda bits: sizes[bits], default=16.0)


def open_and_scan(
    path: Path, workspace: Workspace, trained: TrainedSchemeConfig | None = None
) -> Generator[Progress, None, Inspection]:
    """Check the files of `path` without building a model; raises CheckpointError where they cannot be audited.

    trained: how its weights were trained, where its files do not say so themselves. CheckpointChangedError where the
    files change meanwhile.
    """
    found = Stamp.of(path)
    files = open_checkpoint(path)
    stamp = found.restricted(files.files)
    require_decoder_only(files.config)
    with stamp.watched():
        precision = precision_of(files, trained)
        workspace.make()
        scan = workspace.kept_scan(stamp)
        if scan is None:
            scan = yield from _scan(files, precision)
            stamp.require_unchanged()
            workspace.keep_scan(stamp, scan)
        stamp.require_unchanged()
    # Found anew each time: what else lies there may change while the files that were scanned do not.
    scan = replace(scan, findings=(*scan.findings, *other_files(files)))
    return Inspection(files.directory, files, scan, precision, trained, stamp)


def _scan(files: CheckpointFiles, precision: Precision) -> Generator[Progress, None, ScanResult]:
    """Look at every tensor; those that the model has no use for are no weights, whatever they hold."""
    from peelcli.checkpoint.skeleton import build_skeleton, rehearse

    if precision.running.packing is not None:  # held against the model once it is unpacked
        return (yield from run_scan(files))
    _, skeleton, _ = build_skeleton(files)
    fit = rehearse(files, skeleton)
    return (yield from run_scan(files, no_weights=fit.no_weights, findings=fit.findings))
