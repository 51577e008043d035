"""TensorBoard: scalars in an event file of the directory."""

from __future__ import annotations

from collections.abc import Sequence

from peelcli.records import AuditResult
from peelcli.tracking.loggers.figures import figures


def log(where: str, results: Sequence[AuditResult]) -> None:
    """Add an event file to the directory `where`; those of all nights make one curve a figure."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(where) as writer:
        for step, values in figures(results):
            for name, value in values.items():
                writer.add_scalar(name, value, step)
        for result in results:
            for verdict in result.layers:
                if verdict.layer in result.flagged:
                    text = "    " + verdict.reason.replace("\n", " ")  # indented: shown as it stands
                    writer.add_text(f"peel/layer_{verdict.layer:03d}/reason", text, result.run.step or 0)
