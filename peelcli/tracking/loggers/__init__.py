"""Loggers of an audit's figures, where people already look. One file per kind, and the table of them.

Each is a function of (where, results) that logs the figures of `metrics_of` at each checkpoint's training step, or
where no step is known at its number among the results. Their libraries are extras, imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from peelcli.errors import UsageError
from peelcli.records import AuditResult

LOGGERS = ("tensorboard", "wandb", "mlflow")
_EXTRAS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}  # the library that each needs


def log_to(target: str, results: Sequence[AuditResult]) -> None:
    """Log `results` to a target such as `tensorboard:runs/peel`, `wandb:my-project` or `mlflow:http://localhost:5000`.

    Raises UsageError where the kind is unknown or its library is not installed; whatever the library raises else.
    """
    kind, _, where = target.partition(":")
    if kind not in LOGGERS or not where:
        raise UsageError(f"--log-to {target}: expected tensorboard:DIR, wandb:PROJECT or mlflow:URI")
    try:
        import_module(_EXTRAS[kind])
    except ImportError as error:
        raise UsageError(
            f"--log-to {target}: needs a library that is not there ({error}); pip install 'peelcli[{kind}]'"
        ) from error
    log: Callable[[str, Sequence[AuditResult]], None] = import_module(
        f"peelcli.tracking.loggers.{kind}_log"
    ).log
    log(where, results)
