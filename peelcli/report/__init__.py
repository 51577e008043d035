"""Reports: verdicts in, text out. One file per format, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peelcli.errors import UsageError
from peelcli.records import AuditResult, HistoryEntry
from peelcli.report.json_format import render_json
from peelcli.report.table import render_history, render_table

# Each takes (results, *, top, width, color) and returns text that ends with a newline.
REPORTS: dict[str, Callable[..., str]] = {"table": render_table, "json": render_json}


def render(
    results: Sequence[AuditResult],
    format: str = "table",
    *,
    top: int | None = None,
    width: int = 80,
    color: bool = False,
    history: Sequence[HistoryEntry] = (),
) -> str:
    """`results` in one of `REPORTS`, and the `history` of audits below them, or alone.

    Raises UsageError for an unknown format, for one that has no place for a history, and for `top` below 1.
    """
    if format not in REPORTS:
        raise UsageError(f"--format {format!r}: expected one of {', '.join(REPORTS)}")
    if not history:
        return REPORTS[format](results, top=top, width=width, color=color)
    if format == "json":
        return render_json(results, top=top, history=history)
    if format != "table":
        raise UsageError(
            f"--format {format}: has no place for a history; expected table or json with --history"
        )
    parts = [render_table(results, top=top, width=width, color=color)] if results else []
    return "\n".join([*parts, render_history(history, width=width, color=color)])
