"""What is logged of a result, whatever the logger."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from peelcli.records import AuditResult
from peelcli.tracking.history import entry_of
from peelcli.tracking.metrics import metrics_of


def figures(results: Sequence[AuditResult]) -> Iterator[tuple[int, dict[str, float]]]:
    """Of each result its training step, or where that is not known its number, and its figures by name."""
    for number, result in enumerate(results):
        step = number if result.run.step is None else result.run.step
        yield step, metrics_of(asdict(entry_of(result)))


def series_name(results: Sequence[AuditResult]) -> str:
    """The name of the run that the checkpoints were saved to: that of the directory around the newest."""
    return Path(results[-1].run.checkpoint).absolute().parent.name or "peel"


def series_id(results: Sequence[AuditResult]) -> str:
    """The same for every audit of one run's checkpoints, so that the figures of later nights join the curves."""
    home = str(Path(results[-1].run.checkpoint).absolute().parent)
    return hashlib.sha256(f"{home} {results[-1].run.data_hash}".encode()).hexdigest()[:16]
