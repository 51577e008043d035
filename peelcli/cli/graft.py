"""`peel graft`: write a copy of the checkpoint with a layer's reference in place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peelcli.cli.console import Console
from peelcli.cli.options import with_options
from peelcli.cli.reporting import judge_runs
from peelcli.cli.verify import Checkpoint, Fit
from peelcli.cli.workspaces import workspace_for
from peelcli.config import Configs, DeviceConfig, ReportConfig
from peelcli.errors import UsageError

Layer = Annotated[int, typer.Option("--layer", metavar="N", help="Layer to replace, counted from 1.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="New directory for the copy.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--reference", metavar="KEY", help="Which reference; unset: the one that decided.", show_default=False
    ),
]


@with_options(DeviceConfig)
def graft(
    fit: Fit,
    checkpoint: Checkpoint,
    layer: Layer,
    output: Output,
    configs: Configs,
    console: Console,
    reference: Key = None,
) -> int:
    """Write a checkpoint that transformers opens, with the reference of one layer in place, and print its path."""
    console.hush_libraries()
    from peelcli.stages.graft import graft as write_graft
    from peelcli.stages.open_model import open_fitted
    from peelcli.storage.fit_reader import read_fit

    run = read_fit(fit)
    (result,) = judge_runs([run], ReportConfig())
    known = {s.reference.key: s.reference for s in run.scores if s.reference.layer == layer}
    decided = [v.reference for v in result.layers if v.layer == layer and v.reference is not None]
    if reference is None and not decided:
        raise UsageError(f"--layer {layer}: has no reference in {fit}, which holds layers {list(run.layers)}")
    if reference is not None and reference not in known:
        raise UsageError(
            f"--reference {reference}: expected one of {', '.join(known) or 'none: no such layer'}"
        )
    chosen = known[reference] if reference is not None else decided[0]
    opened, model = console.drive(
        open_fitted(checkpoint, run, configs[DeviceConfig], workspace_for(checkpoint, None))
    )
    write_graft(fit, opened.files, model, chosen, output)
    console.note(
        f"{chosen.key} in place; loss {result.loss_with(chosen):.5f} nats per token on the audit's tokens"
    )
    if not opened.precision.is_plain:
        console.note(
            f"{output} holds the weights that run as plain {run.dtype} numbers, without its quantization_config"
            + ("; their inputs are no longer rounded" if opened.precision.activations else "")
        )
    console.written(output)
    return 0
