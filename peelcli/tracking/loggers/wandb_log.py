"""Weights & Biases: one run of the project for all audits of a training run."""

from __future__ import annotations

from collections.abc import Sequence

from peelcli.records import AuditResult
from peelcli.tracking.loggers.figures import figures, series_id, series_name


def log(where: str, results: Sequence[AuditResult]) -> None:
    """Log to the project `where`; WANDB_MODE=offline and the library's other variables have their say."""
    import wandb

    run = wandb.init(
        project=where,
        id=f"peel-{series_id(results)}",
        name=f"peel {series_name(results)}",
        resume="allow",
        job_type="peel",
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("peel/step")
    run.define_metric("peel/*", step_metric="peel/step")
    for step, values in figures(results):
        run.log({**values, "peel/step": step})
    run.summary["peel/flagged_layers"] = list(results[-1].flagged)
    run.finish()
