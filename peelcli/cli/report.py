"""`peel report`: judge fits, render them, and say in the exit code whether a layer is flagged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peelcli.cli.console import Console
from peelcli.cli.judging import check_format, exit_code, judge_runs, show
from peelcli.cli.options import with_options
from peelcli.config import Configs, ReportConfig

Fits = Annotated[
    list[Path], typer.Argument(metavar="FIT...", help="Files that `peel fit` wrote, oldest first.")
]


@with_options(ReportConfig)
def report(fits: Fits, configs: Configs, console: Console) -> int:
    """Judge every layer and render the verdicts; several fits are shown side by side."""
    check_format(configs[ReportConfig], console)
    console.hush_libraries()
    from peelcli.fitstore import read_fit
    from peelcli.same_tokens import require_comparable

    runs = [read_fit(path) for path in fits]
    require_comparable(list(zip(fits, runs, strict=True)))
    results = judge_runs(runs, configs[ReportConfig])
    show(results, configs[ReportConfig], console)
    return exit_code(results, configs[ReportConfig])
