"""`peel report`: judge fits, render them, and say in the exit code whether a layer is flagged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peelcli.cli.console import Console
from peelcli.cli.judging import WriteBaseline, exit_code, judge_runs, keep_baseline, read_if_any, show
from peelcli.cli.options import with_options
from peelcli.config import CompareConfig, Configs, ReportConfig

Fits = Annotated[
    list[Path], typer.Argument(metavar="FIT...", help="Files that `peel fit` wrote, oldest first.")
]


@with_options(ReportConfig, CompareConfig)
def report(fits: Fits, configs: Configs, console: Console, write_baseline: WriteBaseline = None) -> int:
    """Judge every layer and render the verdicts; several fits are shown side by side, with what changed."""
    console.hush_libraries()
    from peelcli.fitstore import read_fit
    from peelcli.same_tokens import require_comparable

    runs = [read_fit(path) for path in fits]
    require_comparable(list(zip(fits, runs, strict=True)))
    results = judge_runs(runs, configs[ReportConfig], read_if_any(configs[CompareConfig].baseline))
    show(results, configs[ReportConfig], console)
    keep_baseline(write_baseline, results, console)
    return exit_code(results, configs[ReportConfig])
