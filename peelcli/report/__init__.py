"""Reports: verdicts in, text out. One file per format, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peelcli.errors import UsageError
from peelcli.records import AuditResult, HistoryEntry
from peelcli.report.csv_format import render_csv
from peelcli.report.explain import EXPLANATIONS as EXPLANATIONS
from peelcli.report.explain import render_explanation as render_explanation
from peelcli.report.github import render_github
from peelcli.report.html import render_html, require_plotly
from peelcli.report.json_format import render_json
from peelcli.report.junit import render_junit
from peelcli.report.markdown import render_markdown
from peelcli.report.sarif import render_sarif
from peelcli.report.table import render_history, render_table

# Each takes (results, *, top, width, color, unicode) and returns text that ends with a newline. The last three are for
# the table, which alone is laid out for a page; the others have no use for them.
REPORTS: dict[str, Callable[..., str]] = {
    "table": render_table,
    "json": render_json,
    "csv": render_csv,
    "markdown": render_markdown,
    "github": render_github,
    "junit": render_junit,
    "sarif": render_sarif,
    "html": render_html,
}


def render(
    results: Sequence[AuditResult],
    format: str = "table",
    *,
    top: int | None = None,
    width: int = 80,
    color: bool = False,
    unicode: bool = False,
    history: Sequence[HistoryEntry] = (),
) -> str:
    """`results` in one of `REPORTS`, and the `history` of audits below them, or alone.

    Raises UsageError for an unknown format, for one that has no place for a history, and for `top` below 1.
    """
    if format not in REPORTS:
        raise UsageError(f"--format {format!r}: expected one of {', '.join(REPORTS)}")
    if not history:
        return REPORTS[format](results, top=top, width=width, color=color, unicode=unicode)
    if format == "json":
        return render_json(results, top=top, history=history)
    if format != "table":
        raise UsageError(
            f"--format {format}: has no place for a history; expected table or json with --history"
        )
    parts = [render(results, top=top, width=width, color=color, unicode=unicode)] if results else []
    return "\n".join([*parts, render_history(history, width=width, color=color, unicode=unicode)])


def require_format(format: str) -> None:
    """Raises UsageError where `format` needs a library that is not installed: before hours of work, not after."""
    if format == "html":
        require_plotly()
