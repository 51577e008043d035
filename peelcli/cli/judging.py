"""From runs to a rendered report and an exit code, as `report`, `audit` and `demo` share it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from peelcli.cli.console import Console
from peelcli.config import ReportConfig
from peelcli.errors import ResourceError, UsageError
from peelcli.records import AuditResult, Run

FLAGGED = 1


def judge_runs(runs: Sequence[Run], settings: ReportConfig) -> list[AuditResult]:
    """The verdicts of every run, oldest first, under the policy of `settings`."""
    from peelcli.verdict import Policy, judge, note_identical, with_running_minimum

    policy = Policy(
        fail_on=settings.fail_on, confidence=settings.confidence, matched_margin=settings.matched_margin
    )
    return with_running_minimum([judge(run, policy) for run in note_identical(runs)])


def check_format(settings: ReportConfig, console: Console, *, to_file: bool = True) -> None:
    """Raises UsageError, before any work, for a format that cannot be rendered or is not to be read as it stands."""
    from peelcli.report import require_format

    require_format(settings.format)
    output = settings.output if to_file and str(settings.output) != "-" else None
    if settings.format == "html" and output is None and console.stdout_is_terminal:
        named = "-o report.html, or " if to_file else ""
        raise UsageError(
            f"--format html is a page for a browser: send it to a file, with {named}> report.html"
        )


def show(
    results: Sequence[AuditResult], settings: ReportConfig, console: Console, *, to_file: bool = True
) -> None:
    """Render the report to stdout, or to the file of `settings` where the command has one."""
    from peelcli.report import render

    output = settings.output if to_file and str(settings.output) != "-" else None
    width = page_width(console.stdout_is_terminal and output is None)
    color = output is None and console.color(console.stdout)
    unicode = output is not None or console.unicode(console.stdout)  # a file is written in UTF-8
    text = render(results, settings.format, top=settings.top, width=width, color=color, unicode=unicode)
    if output is None:
        console.result(text)
        return
    partial = output.with_name(output.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ResourceError(
            f"{output}: cannot be written ({error.strerror}); name another --output"
        ) from error
    console.written(output)


def page_width(on_terminal: bool) -> int:
    """Columns to lay a report out for: the terminal's, or COLUMNS, or 80."""
    return shutil.get_terminal_size().columns if on_terminal or "COLUMNS" in os.environ else 80


def exit_code(results: Sequence[AuditResult], settings: ReportConfig) -> int:
    """1 where a layer or a network is flagged, unless --exit-zero."""
    flagged = any(r.flagged or r.network_flagged for r in results)
    return FLAGGED if flagged and not settings.exit_zero else 0
