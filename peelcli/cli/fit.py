"""`peel fit`: fit the references of every layer to the trained states, and measure them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peelcli.cli.console import Console
from peelcli.cli.options import with_options
from peelcli.cli.workspaces import workspace_for
from peelcli.config import Configs, FitConfig
from peelcli.errors import ArtefactError

Activations = Annotated[Path, typer.Argument(metavar="ACTS", help="File that `peel extract` wrote.")]
Moved = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="CKPT",
        help="Where the checkpoint is now, if it has moved.",
        show_default=False,
    ),
]
Earlier = Annotated[
    list[Path] | None,
    typer.Option(
        "--earlier",
        metavar="CKPT",
        help="Earlier checkpoint of the run, repeatable, oldest first: would its blocks do better (rollback)?",
        show_default=False,
    ),
]


@with_options(FitConfig)
def fit(
    activations: Activations,
    configs: Configs,
    console: Console,
    checkpoint: Moved = None,
    earlier: Earlier = None,
) -> int:
    """Fit and score the references of every layer, and print the path of the file that holds them."""
    console.hush_libraries()
    from peelcli.stages.fit import run_fit
    from peelcli.stages.inspection import open_and_scan
    from peelcli.stages.precision import from_settings
    from peelcli.storage.activations import ActivationFile

    settings = configs[FitConfig]
    acts = ActivationFile(activations)
    acts.close()
    where = checkpoint or Path(acts.about["checkpoint"])
    if not where.is_dir():
        raise ArtefactError(
            f"{activations}: was extracted from {where}, which is not there (from here). Name the checkpoint with "
            "--checkpoint."
        )
    workspace = workspace_for(where, None)
    trained = from_settings(acts.config.get("trained_scheme"), str(activations))
    opened = console.drive(open_and_scan(where, workspace, trained))
    path = console.drive(run_fit(opened, activations, settings, workspace, settings.output, earlier or ()))
    console.written(path)
    return 0
