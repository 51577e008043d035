"""MLflow: one run of the experiment `peel` for all audits of a training run."""

from __future__ import annotations

import time
from collections.abc import Sequence

from peelcli.records import AuditResult
from peelcli.tracking.loggers.figures import figures, series_id, series_name

EXPERIMENT = "peel"
BATCH = 1000  # metrics that the server takes in one request


def log(where: str, results: Sequence[AuditResult]) -> None:
    """Log to the tracking server or store at the URI `where`."""
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=where)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    home = client.create_experiment(EXPERIMENT) if experiment is None else experiment.experiment_id
    tag = series_id(results)
    found = client.search_runs([home], f"tags.`peel.series` = '{tag}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
    else:
        tags = {"peel.series": tag, "mlflow.runName": f"peel {series_name(results)}"}
        run_id = client.create_run(home, tags=tags).info.run_id
    now = int(time.time() * 1000)
    for step, values in figures(results):
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), BATCH):
            client.log_batch(run_id, metrics[start : start + BATCH])
    client.set_tag(run_id, "peel.flagged_layers", ", ".join(map(str, results[-1].flagged)) or "none")
    client.set_terminated(run_id)
