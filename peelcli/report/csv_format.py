"""The report as a table for spreadsheets and data frames: one row a layer, runs one after another."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from io import StringIO

from peelcli.records import AuditResult, LayerChange, LayerVerdict
from peelcli.records.printable import printable
from peelcli.report import wording
from peelcli.report.changes import change_of
from peelcli.report.ranking import shown_layers

FORMULA = "=+-@＝＋－＠"  # what a spreadsheet takes a cell for a formula by
Cell = str | float | bool | None

OF_RUN: dict[str, Callable[[AuditResult], Cell]] = {
    "checkpoint": lambda r: r.run.checkpoint,
    "checkpoint_id": lambda r: r.run.checkpoint_id,
    "step": lambda r: r.run.step,
    "ce": lambda r: r.network.ce,
    "zone": lambda r: r.network.zone,
    "network_flags": lambda r: " ".join(r.network.flags),
    "network_flagged": lambda r: r.network_flagged,
}
OF_LAYER: dict[str, Callable[[LayerVerdict], Cell]] = {
    "verdict": lambda v: v.verdict,
    "sublayer": lambda v: v.sublayer,
    "gap": lambda v: v.gap,
    "gap_low": lambda v: v.gap_interval[0] if v.gap_interval else None,
    "gap_high": lambda v: v.gap_interval[1] if v.gap_interval else None,
    "reference": lambda v: v.reference.key if v.reference else None,
    "effective_bits": lambda v: v.effective_bits,
    "own_bits": lambda v: v.own_bits,
    "fvu": lambda v: v.fvu,
    "drop_cost": lambda v: v.drop_cost,
    "score": lambda v: v.score,
    "reason": lambda v: v.reason,
    "advice": lambda v: v.advice,
    "notes": lambda v: " ".join(v.notes),
}
# Since the run before, or since a baseline.
OF_CHANGE: dict[str, Callable[[LayerChange], Cell]] = {
    "change": lambda c: c.status,
    "verdict_before": lambda c: c.before,
    "gap_change": lambda c: c.gap_change,
    "gap_change_low": lambda c: c.gap_change_interval[0] if c.gap_change_interval else None,
    "gap_change_high": lambda c: c.gap_change_interval[1] if c.gap_change_interval else None,
}
# Behind all others, for columns are only ever added at the end.
OF_FILES: dict[str, Callable[[AuditResult], Cell]] = {
    "findings": lambda r: " ".join(map(wording.finding, r.run.findings)),
}


def render_csv(results: Sequence[AuditResult], *, top: int | None = None, **_page: object) -> str:
    """`results` as CSV with a header line; columns are added at the end, never renamed.

    A run without audited layers has one row whose layer is empty. A figure that is not finite is empty. Text is made
    one printable line, with `'` before what a spreadsheet would run as a formula. Raises UsageError where `top` is
    below 1.
    """
    shown, _ = shown_layers(results, top)
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*OF_RUN, "layer", "flagged", *OF_LAYER, *OF_CHANGE, *OF_FILES])
    for result in results:
        run = [_cell(read(result)) for read in OF_RUN.values()]
        files = [_cell(read(result)) for read in OF_FILES.values()]
        if not result.layers:
            writer.writerow([*run, *[""] * (2 + len(OF_LAYER) + len(OF_CHANGE)), *files])
        for verdict in result.layers:
            if verdict.layer in shown:
                flagged = _cell(verdict.layer in result.flagged)
                cells = [_cell(read(verdict)) for read in OF_LAYER.values()]
                change = change_of(result, verdict.layer)
                changed = [_cell(read(change) if change else None) for read in OF_CHANGE.values()]
                writer.writerow([*run, verdict.layer, flagged, *cells, *changed, *files])
    return out.getvalue()


def _cell(value: Cell) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value)
    text = printable(value)
    return f"'{text}" if text.lstrip()[:1] in tuple(FORMULA) else text
