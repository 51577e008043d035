"""From runs to a rendered report and an exit code, shared by `report`, `audit` and `demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from peelcli.cli import signals
from peelcli.cli.console import Console
from peelcli.config import Configs, FitConfig, ReportConfig
from peelcli.errors import PeelError, ResourceError, UsageError
from peelcli.records import AuditResult, HistoryEntry, Run
from peelcli.runtime import durable

FLAGGED = 1

# An option of its own and no setting: a baseline is to change where somebody says so, and not because a file does.
WriteBaseline = Annotated[
    Path | None,
    typer.Option(
        "--write-baseline",
        metavar="FILE",
        help="Keep the newest audit as a baseline for later ones, once it is judged.",
        show_default=False,
    ),
]


def read_if_any(path: Path | None) -> AuditResult | None:
    """The baseline in a file; None if no file is given."""
    if path is None:
        return None
    from peelcli.tracking.baseline import read_baseline

    return read_baseline(path)


def fit_settings(configs: Configs) -> FitConfig:
    """The settings of an audit's fit, with the margin of its report, so that both use one policy.

    UsageError where the two sections of a file name different margins.
    """
    fit, report = configs[FitConfig], configs[ReportConfig]
    margins = [m for m in (report.matched_margin, fit.matched_margin) if m is not None]
    if len(set(margins)) > 1:
        raise UsageError(
            f"matched_margin: is {margins[0]:g} under 'report:' and {margins[1]:g} under 'fit:', and one audit has one "
            "margin. Keep one of them, or give --matched-margin."
        )
    return replace(fit, matched_margin=margins[0] if margins else None)


def _margin(runs: Sequence[Run], settings: ReportConfig) -> float | None:
    """The margin for verdicts: the requested one, else the one that the fits were measured with."""
    from peelcli.verdict import screened_under

    if settings.matched_margin is not None:
        return settings.matched_margin
    margins = {screened_under(run).matched_margin for run in runs if run.scores}
    if len(margins) > 1:
        named = ", ".join("auto" if m is None else f"{m:g}" for m in sorted(margins, key=lambda m: m or 0.0))
        raise UsageError(
            f"--matched-margin: the fits were measured under different margins ({named}). Name the one to judge all of "
            "them by."
        )
    return margins.pop() if margins else None


def judge_runs(
    runs: Sequence[Run], settings: ReportConfig, baseline: AuditResult | None = None
) -> list[AuditResult]:
    """The verdicts of all runs, oldest first, under the policy of `settings`, and the changes between them.

    With a baseline, what regressed since flags too. UsageError where it is of another network than the newest run, or
    of other tokens.
    """
    from peelcli.verdict import Policy, judge, note_identical, with_comparisons, with_running_minimum

    if baseline is not None and runs:
        _require_alike(baseline, runs[-1])
    policy = Policy(
        fail_on=settings.fail_on, confidence=settings.confidence, matched_margin=_margin(runs, settings)
    )
    if baseline is not None and settings.fail_on != ("none",):
        policy = replace(policy, fail_on=(*policy.fail_on, "regressed"))
    results = with_running_minimum([judge(run, policy) for run in note_identical(runs)])
    return with_comparisons(results, policy, baseline)


def _require_alike(baseline: AuditResult, run: Run) -> None:
    from peelcli.tracking.same_tokens import require_same_tokens, tokens_of

    then = baseline.run
    if then.num_layers != run.num_layers or (run.family and then.family != run.family):
        raise UsageError(
            f"--baseline: is of {then.checkpoint} ({then.family}, {then.num_layers} layers), and "
            f"{run.checkpoint} is a {run.family or 'network'} of {run.num_layers} layers. Name the baseline of the "
            "same run, or write a new one with --write-baseline."
        )
    require_same_tokens(tokens_of(then), tokens_of(run))


def keep_baseline(path: Path | None, results: Sequence[AuditResult], console: Console) -> None:
    """Write the newest of `results` as the baseline `path`, if a path is given."""
    if path is None:
        return
    from peelcli.tracking.baseline import write_baseline

    write_baseline(path, results[-1])
    console.note(f"the baseline is now {results[-1].run.checkpoint}, kept in {path}")


def extend_history(path: Path | None, results: Sequence[AuditResult], console: Console) -> None:
    """Append the new entries among `results` to the history `path`, if a path is given."""
    if path is None or not results:
        return
    from peelcli.tracking.history import append_history, entry_of

    added = append_history(path, [entry_of(result) for result in results])
    console.note(f"{added} of {len(results)} audits are new to {path}")


def check_format(settings: ReportConfig, console: Console, *, to_file: bool = True) -> None:
    """Raise UsageError, before any work, for a report format that cannot be rendered to its target."""
    from peelcli.report import require_format

    require_format(settings.format)
    output = settings.output if to_file and str(settings.output) != "-" else None
    if settings.format == "html" and output is None and console.stdout_is_terminal:
        named = "-o report.html, or " if to_file else ""
        raise UsageError(
            f"--format html is a page for a browser: send it to a file, with {named}> report.html"
        )


def show(
    results: Sequence[AuditResult],
    settings: ReportConfig,
    console: Console,
    *,
    to_file: bool = True,
    history: Sequence[HistoryEntry] = (),
) -> None:
    """Render the report to stdout, or to the output file in `settings` if the command has one."""
    from peelcli.report import render

    output = settings.output if to_file and str(settings.output) != "-" else None
    width = console.width(console.stdout_is_terminal and output is None)
    color = output is None and console.color(console.stdout)
    unicode = output is not None or console.unicode(console.stdout)  # a file is written in UTF-8
    text = render(
        results,
        settings.format,
        top=settings.top,
        width=width,
        color=color,
        unicode=unicode,
        history=history,
    )
    if output is None:
        console.result(text)
        return
    try:
        with signals.deferred():
            durable.write_text(output, text)
    except OSError as error:
        raise ResourceError(
            f"{output}: cannot be written ({error.strerror}); name another --output"
        ) from error
    console.written(output)


def log_figures(targets: Sequence[str], results: Sequence[AuditResult], console: Console) -> None:
    """Log to the requested loggers after the report is written, so that a logger's failure cannot lose it."""
    if not targets or not results:
        return
    console.finish()
    from peelcli.tracking.loggers import log_to

    for target in targets:
        try:
            log_to(target, results)
        except PeelError:
            raise
        except Exception as error:
            raise ResourceError(
                f"--log-to {target}: the figures could not be logged ({type(error).__name__}: {error}); the report is "
                "whole all the same"
            ) from error
        console.note(f"logged to {target}")


def exit_code(results: Sequence[AuditResult], settings: ReportConfig) -> int:
    """1 if a layer or a network is flagged and --exit-zero is off, else 0."""
    flagged = any(r.flagged or r.network_flagged for r in results)
    return FLAGGED if flagged and not settings.exit_zero else 0
