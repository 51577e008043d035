"""`peel extract`: run the checkpoint over the calibration tokens and store every layer's trained states."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peelcli.cli.console import Console
from peelcli.cli.options import with_options
from peelcli.cli.workspaces import workspace_for
from peelcli.config import Configs, ExtractConfig, TrainedSchemeConfig

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Directory with config.json and weights.")]


@with_options(ExtractConfig, TrainedSchemeConfig)
def extract(checkpoint: Checkpoint, configs: Configs, console: Console) -> int:
    """Dump the trained states of every layer into an HDF5 file, and print its path."""
    console.hush_libraries()
    from peelcli.stages.extract import run_extract
    from peelcli.stages.inspection import open_and_scan

    settings = configs[ExtractConfig]
    workspace = workspace_for(checkpoint, None)
    opened = console.drive(open_and_scan(checkpoint, workspace, configs[TrainedSchemeConfig]))
    for finding in opened.scan.findings:  # a fit's report shows them; a file of states has none
        console.warn(finding.message)
    path = console.drive(run_extract(opened, settings, workspace, settings.output))
    console.written(path)
    return 0
