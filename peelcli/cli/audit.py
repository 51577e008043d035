"""`peel audit`: extract, fit and report in one, doing nothing twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from peelcli.cli.console import Console
from peelcli.cli.judging import exit_code, judge_runs, show
from peelcli.cli.options import with_options
from peelcli.cli.places import workspace_for
from peelcli.config import AuditConfig, Configs, ExtractConfig, FitConfig, ReportConfig

Checkpoints = Annotated[
    list[Path],
    typer.Argument(metavar="CKPT...", help="Directories with config.json and weights, oldest first."),
]


@with_options(ExtractConfig, FitConfig, ReportConfig, AuditConfig)
def audit(checkpoints: Checkpoints, configs: Configs, console: Console) -> int:
    """Audit checkpoints: which layers are under-optimised, by what evidence, and what to do."""
    console.hush_libraries()
    from peelcli.audit import audit_steps
    from peelcli.plan import plan_steps, render_plan

    settings, report = configs[AuditConfig], configs[ReportConfig]
    extract = replace(configs[ExtractConfig], resume=settings.resume, overwrite=settings.overwrite)
    fit = replace(configs[FitConfig], resume=settings.resume, overwrite=settings.overwrite)
    runs = []
    for checkpoint in checkpoints:
        workspace = workspace_for(checkpoint, settings.output, alone=len(checkpoints) == 1)
        if settings.dry_run:
            plan = console.drive(plan_steps(checkpoint, extract, fit, workspace))
            console.result(render_plan(plan))
            continue
        done = console.drive(audit_steps(checkpoint, extract, fit, workspace))
        runs.append(done.run)
        if done.fit is not None:
            console.note(f"kept in {done.fit} (peel report, peel verify, peel graft)")
        if settings.discard_activations and done.activations is not None:
            done.activations.unlink()
    if settings.dry_run:
        return 0
    results = judge_runs(runs, report)
    show(results, report, console, to_file=False)
    return exit_code(results, report)
