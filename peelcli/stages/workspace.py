"""The work directory of an audit: which file holds what, under names that say to what it belongs.

A file is used again only where its key is the same: the checkpoint's hash, the text, every setting that matters,
and the version of peel. Never inside the checkpoint's own directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peelcli import __version__
from peelcli.checkpoint.scan import ScanResult
from peelcli.checkpoint.stamp import Stamp
from peelcli.errors import CalibrationError, ResourceError, UsageError
from peelcli.records import Finding
from peelcli.records.printable import is_visible
from peelcli.runtime import durable


def signature(paths: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of change of files: what tells that a file has not changed without reading it."""
    found = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise CalibrationError(f"{path}: {error.strerror}; check the path given to --data.") from error
        found.append([path.name, status.st_size, status.st_mtime_ns])
    return found


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON value and this version of peel."""
    text = json.dumps([__version__, value], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_outside(output: Path, checkpoint: Path) -> None:
    """UsageError where `output`, a file or a directory, would lie in the checkpoint's own directory."""
    resolved, source = output.resolve(), checkpoint.resolve()
    if resolved == source or source in resolved.parents:
        raise UsageError(
            f"{output}: lies inside the checkpoint {checkpoint}, which peel never writes to. Name another place "
            "with --output."
        )


class Workspace:
    """The files of one checkpoint's audits."""

    def __init__(self, directory: Path, checkpoint: Path) -> None:
        """Name the directory; `make` makes it. UsageError where it lies inside the checkpoint's."""
        require_outside(directory, checkpoint)
        self.directory = directory
        self._base = directory

    def make(self) -> None:
        """Make the directory, once it is known that there is a checkpoint to work on."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"{self.directory}: cannot be made ({error.strerror}). Name another work directory with --output."
            ) from error

    @classmethod
    def under(cls, base: Path, checkpoint: Path) -> Workspace:
        """The directory for `checkpoint` below `base`: its name, and a hash of its whole path."""
        where = hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:8]
        workspace = cls(base / f"{_plain_name(checkpoint.resolve())}-{where}", checkpoint)
        workspace._base = base
        return workspace

    def of_other(self, checkpoint: Path) -> Workspace:
        """The directory of another checkpoint: beside this one where both lie below a base, else within it."""
        return Workspace.under(self._base, checkpoint)

    def activations(self, key: str) -> Path:
        """The file of trained states of an extraction."""
        return self.directory / f"acts-{key}.h5"

    def fit(self, key: str) -> Path:
        """The file of a fit."""
        return self.directory / f"fit-{key}.h5"

    @property
    def offload(self) -> Path:
        """Where weights go that cannot be read in place."""
        return self.directory / "offload"

    # -- the scan, kept for as long as no file of the checkpoint changes ----------------------------------------------

    def _scan_path(self) -> Path:
        return self.directory / "scan.json"

    def kept_scan(self, stamp: Stamp) -> ScanResult | None:
        """The scan of these very files, where it was done before; one that cannot be read is done again."""
        try:
            kept = json.loads(self._scan_path().read_text(encoding="utf-8"))
            if kept["key"] != _scan_key(stamp) or kept["digest"] != digest(kept["scan"]):
                return None
            return _scan_from(kept["scan"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def keep_scan(self, stamp: Stamp, scan: ScanResult) -> None:
        """Remember a scan."""
        kept = json.loads(json.dumps(asdict(scan)))
        record = {"key": _scan_key(stamp), "digest": digest(kept), "scan": kept}
        durable.write_text(self._scan_path(), json.dumps(record))


def _plain_name(checkpoint: Path) -> str:
    """The checkpoint's name without what a terminal or a CI runner would obey: the paths in it are printed."""
    name = "".join(char if is_visible(char) and char not in "#:" else "_" for char in checkpoint.name)
    return name or "checkpoint"


def _scan_key(stamp: Stamp) -> str:
    return digest([str(stamp.directory), stamp.key])


def _scan_from(values: Mapping[str, Any]) -> ScanResult:
    by_layer = {
        name: {int(k): v for k, v in values[name].items()}
        for name in ("layer_hashes", "layer_num_parameters")
    }
    findings = tuple(Finding(**f) for f in values["findings"])
    return ScanResult(**{**values, **by_layer, "findings": findings})
