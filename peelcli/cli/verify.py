"""`peel verify`: put each flagged layer's reference into the checkpoint and measure again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peelcli.cli.console import Console
from peelcli.cli.options import with_options
from peelcli.cli.reporting import judge_runs
from peelcli.cli.workspaces import workspace_for
from peelcli.config import Configs, DeviceConfig, ReportConfig, parse_layers
from peelcli.records.printable import printable

Fit = Annotated[Path, typer.Argument(metavar="FIT", help="File that `peel fit` wrote.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="The checkpoint it was fitted to.")]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="LIST",
        help="Layers to replay, such as 1,4-6; unset: those flagged.",
        show_default=False,
    ),
]
PathsToo = Annotated[
    bool,
    typer.Option(
        "--paths", help="Replay the peeled paths too, also where the zone is green.", show_default=False
    ),
]


@with_options(DeviceConfig)
def verify(
    fit: Fit,
    checkpoint: Checkpoint,
    configs: Configs,
    console: Console,
    layers: Layers = None,
    paths: PathsToo = False,
) -> int:
    """Replay the witnesses of what is flagged, or of --layers; fails where a measured gap does not come back."""
    console.hush_libraries()
    from peelcli.runtime.batch_sizes import block_batch
    from peelcli.stages.open_model import open_fitted
    from peelcli.stages.verify import run_verify
    from peelcli.storage.fit_reader import read_fit

    run = read_fit(fit)
    (result,) = judge_runs([run], ReportConfig())
    wanted = parse_layers(layers, run.num_layers) if layers else result.flagged
    chosen = [v.reference for v in result.layers if v.layer in wanted and v.reference is not None]
    # One reference decides on both layers of an exchanged pair.
    gaps = [(result.score_of(reference), result.gap_of(reference)) for reference in dict.fromkeys(chosen)]
    over = paths or (layers is None and result.network.zone in ("red", "yellow"))
    maps = result.path_gaps() if over else []
    if not gaps and not maps:
        console.result(
            f"{printable(str(fit))}: no flagged layer has a witness, and the zone is "
            f"{result.network.zone or 'not known'}; nothing to "
            "verify. Name layers with --layers, or replay the peeled paths with --paths."
        )
        return 0
    opened, model = console.drive(
        open_fitted(checkpoint, run, configs[DeviceConfig], workspace_for(checkpoint, None))
    )
    with opened.stamp.watched():
        replays = console.drive(run_verify(fit, model, gaps, maps, block_batch(run.seq_len, model.device)))
        opened.stamp.require_unchanged()
    for replay in replays:
        console.result(
            f"{printable(replay.name)}: gap reported {replay.reported:+.5f}, "
            f"measured {replay.measured:+.5f} nats per token: holds"
        )
    return 0
