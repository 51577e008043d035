"""`peel explain`: everything that is known about one layer, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peelcli.cli.console import Console
from peelcli.cli.options import with_options
from peelcli.cli.reporting import judge_runs
from peelcli.config import ReportConfig

Layer = Annotated[int, typer.Argument(metavar="LAYER", help="The layer, counted from 1.")]
Fits = Annotated[
    list[Path],
    typer.Argument(
        metavar="FIT...", help="Files that `peel fit` wrote, oldest first; the last is explained."
    ),
]
Format = Annotated[
    str, typer.Option("--format", "-f", metavar="NAME", help="One of: table, json.", show_default=False)
]


@with_options()
def explain(layer: Layer, fits: Fits, console: Console, format: Format = "table") -> int:
    """Say in words what was tried on a layer, what each cost, why the verdict, and what to try next in training."""
    console.hush_libraries()
    from peelcli.report import render_explanation
    from peelcli.storage.fit_reader import read_fit
    from peelcli.tracking.same_tokens import require_comparable

    runs = [read_fit(path) for path in fits]
    require_comparable(list(zip(fits, runs, strict=True)))
    results = judge_runs(runs, ReportConfig())
    width, color = console.width(console.stdout_is_terminal), console.color(console.stdout)
    console.result(render_explanation(results, layer, format, width=width, color=color))
    return 0
