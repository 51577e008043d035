"""What changed since the run before or since a baseline: a row a layer, and the reasons below."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from peelcli.records import AuditResult, Comparison, LayerChange, LayerVerdict
from peelcli.report import wording
from peelcli.report.cells import STYLES, ruled_table, text
from peelcli.report.plain import base_name, gap_with_interval, layers_named

STATUS_STYLES = {"regressed": "bold red", "missing": "bold red", "better": "green", "new": "cyan", "same": ""}
CHANGE = (
    "change: of the gap of one reference, the same then and now, with its interval; paired by sequence. Above 0 it "
    "does better against the layer than it did."
)
REGRESSED = (
    "regressed: newly flagged, its reference costs half or less of what it did, or byte for byte as it was."
)


def against(comparison: Comparison) -> str:
    """With what it is compared, such as `the baseline night-1, step 400`."""
    step = "" if comparison.step is None else f", step {comparison.step}"
    return f"{'the baseline ' if comparison.is_baseline else ''}{base_name(comparison.checkpoint)}{step}"


def change_of(result: AuditResult, layer: int) -> LayerChange | None:
    """What became of one layer; None where the run is not compared with any, or the layer not there."""
    found = result.comparison.layers if result.comparison else ()
    return next((change for change in found if change.layer == layer), None)


def outcome(result: AuditResult, verdict: LayerVerdict) -> str:
    """In a word, what is the matter with a layer: its verdict, or what became of it where that is why it is flagged."""
    change = change_of(result, verdict.layer)
    is_worse = change is not None and change.status in ("regressed", "missing")
    if change is not None and is_worse and verdict.layer in result.flagged:
        return change.status if verdict.verdict in ("effective", "undecided") else verdict.verdict
    return verdict.verdict


def words(result: AuditResult, verdict: LayerVerdict) -> list[str]:
    """All that is said about a layer, in sentences; first why it is flagged, where its verdict is not the reason."""
    said = [line for line in (verdict.reason, verdict.advice, *verdict.notes) if line]
    if outcome(result, verdict) == "regressed":
        notes = [note for note in verdict.notes if note.startswith("Regressed: ")]
        said = [*notes, *(line for line in said if line not in notes)]
    return said


def change_table(result: AuditResult, shown: frozenset[int]) -> Table | None:
    """A row for each layer that is `shown` or missing; None where there is nothing to compare with."""
    if result.comparison is None:
        return None
    table = ruled_table()
    table.add_column("layer", justify="right", no_wrap=True)
    for header in ("since then", "was", "is"):
        table.add_column(header, no_wrap=True)
    table.add_column("change", overflow="fold")
    table.add_column("measured by", overflow="fold")
    for change in result.comparison.layers:
        if change.layer in shown or change.after is None:
            table.add_row(*_cells(change, change.layer in result.flagged))
    return table


def _cells(change: LayerChange, flagged: bool) -> list[Text]:
    style = STATUS_STYLES[change.status]
    is_worse = change.status in ("regressed", "missing")
    return [
        text(f"{'! ' if is_worse and flagged else ''}{change.layer}", style if is_worse else ""),
        text(change.status, style),
        *(text(verdict or "-", STYLES.get(verdict or "", "")) for verdict in (change.before, change.after)),
        *map(text, figures(change)),
    ]


def figures(change: LayerChange) -> tuple[str, str]:
    """The change of the gap with its interval, and the reference that it is of."""
    gap = gap_with_interval(change.gap_change, change.gap_change_interval)
    return gap, wording.reference(change.reference, brief=True)


def change_lines(comparison: Comparison) -> list[str]:
    """The loss, each layer that changed and why, and what else a reader must know."""
    lines = []
    if comparison.ce_change is not None:
        figures = gap_with_interval(comparison.ce_change, comparison.ce_change_interval)
        lines.append(f"Loss: {figures} nats/token since then; above 0 the network has got worse.")
    if comparison.new_flags:
        lines.append(f"Network: newly flagged ({', '.join(comparison.new_flags)}).")
    said: dict[tuple[str, str], list[int]] = {}
    for change in comparison.layers:
        if change.reason:
            said.setdefault((change.status, change.reason), []).append(change.layer)
    lines += [f"{layers_named(numbers)}: {status}: {reason}" for (status, reason), numbers in said.items()]
    return [*lines, *comparison.notes]


def column_notes(changes: Sequence[LayerChange]) -> list[str]:
    """What the columns mean."""
    return [CHANGE, *([REGRESSED] if any(c.status == "regressed" for c in changes) else [])]
