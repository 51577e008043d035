"""`peel report`: judge fits, render them, and say in the exit code whether a layer is flagged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peelcli.cli.console import Console
from peelcli.cli.options import with_options
from peelcli.cli.reporting import (
    FLAGGED,
    WriteBaseline,
    check_format,
    exit_code,
    judge_runs,
    keep_baseline,
    log_figures,
    read_if_any,
    show,
)
from peelcli.config import Configs, ReportConfig, TrackConfig
from peelcli.errors import ArtefactError, UsageError

if TYPE_CHECKING:
    from peelcli.records import HistoryEntry

Fits = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[FIT...]",
        help="Files that `peel fit` wrote, oldest first; none where --history alone is drawn.",
    ),
]


@with_options(ReportConfig, TrackConfig)
def report(
    configs: Configs, console: Console, fits: Fits = None, write_baseline: WriteBaseline = None
) -> int:
    """Judge every layer and render the verdicts; several fits are shown side by side, with what changed."""
    settings, compare = configs[ReportConfig], configs[TrackConfig]
    if not fits and (compare.history is None or compare.baseline or write_baseline):
        raise UsageError("missing argument FIT...: name files that `peel fit` wrote, or --history FILE alone")
    check_format(settings, console)
    past = _history(compare.history, console)
    if not fits:
        show([], settings, console, history=past)
        return FLAGGED if past[-1].flagged and not settings.exit_zero else 0
    console.hush_libraries()
    from peelcli.storage.fit_reader import read_fit
    from peelcli.tracking.same_tokens import require_comparable

    runs = [read_fit(path) for path in fits]
    require_comparable(list(zip(fits, runs, strict=True)))
    results = judge_runs(runs, settings, read_if_any(compare.baseline))
    show(results, settings, console, history=past)
    keep_baseline(write_baseline, results, console)
    log_figures(compare.log_to, results, console)
    return exit_code(results, settings)


def _history(path: Path | None, console: Console) -> tuple[HistoryEntry, ...]:
    if path is None:
        return ()
    from peelcli.tracking.history import read_history

    found = read_history(path)
    for warning in found.warnings:
        console.warn(warning)
    if not found.entries:
        raise ArtefactError(f"{path}: holds no audit; `peel audit --history FILE` adds them")
    return found.entries
