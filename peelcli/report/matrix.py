"""Several runs side by side: layers down, runs across, with the change since the run before."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from peelcli.records import AuditResult, LayerVerdict
from peelcli.report import wording
from peelcli.report.cells import ruled_table, text, verdict_text
from peelcli.report.plain import fixed, layers_named, signed


def run_key(results: Sequence[AuditResult]) -> Table:
    """A line for each run: its number, its name, its loss and the outcome."""
    key = Table.grid(padding=(0, 1, 0, 0))
    for number, result in enumerate(results, start=1):
        before = results[number - 2] if number > 1 else None
        change = _difference(result.network.ce, before.network.ce if before else None)
        ce = f"CE {fixed(result.network.ce)}{f' ({signed(change, 3)})' if change is not None else ''}"
        flagged = result.flagged or result.network_flagged
        outcome = text(wording.headline(result), "bold red" if flagged else "")
        line = Text.assemble(text(f"{wording.checkpoint(result)}; {ce}; "), outcome)
        key.add_row(text(f"#{number}", "bold"), line)
    return key


def matrices(
    console: Console, results: Sequence[AuditResult], layers: Sequence[int], start: int = 0
) -> list[Table]:
    """As many tables as the console's width calls for, each with all `layers` and a band of the runs from `start`."""
    bands: list[Table] = []
    while layers and start < len(results):
        stop = start + 1
        band = _band(results, layers, range(start, stop))
        while stop < len(results):
            wider = _band(results, layers, range(start, stop + 1))
            if _width(console, wider) > console.width:
                break
            band, stop = wider, stop + 1
        bands.append(band)
        start = stop
    return bands


def _band(results: Sequence[AuditResult], layers: Sequence[int], numbers: range) -> Table:
    table = ruled_table()
    table.add_column("layer", justify="right", no_wrap=True)
    for number in numbers:
        table.add_column(f" #{number + 1}", no_wrap=True)
        table.add_column("gap", justify="right", no_wrap=True)
        if number:
            table.add_column("change", justify="right", no_wrap=True)
    verdicts = [{verdict.layer: verdict for verdict in result.layers} for result in results]
    for layer in layers:
        row = [text(str(layer))]
        for number in numbers:
            verdict = verdicts[number].get(layer)
            mark = text("!" if layer in results[number].flagged else " ", "bold red")
            row.append(Text.assemble(mark, verdict_text(verdict.verdict) if verdict else text("-")))
            row.append(text(signed(verdict.gap) if verdict else "-"))
            if number:
                before = verdicts[number - 1].get(layer) if _comparable(results, number) else None
                row.append(text(signed(_gap_change(results[number], verdict, before))))
        table.add_row(*row)
    return table


def comparison_notes(results: Sequence[AuditResult]) -> list[str]:
    """What a reader must know before comparing the columns."""
    notes = [wording.GAP, wording.CHANGE]
    uneven = [f"#{n + 1}" for n in range(1, len(results)) if not _comparable(results, n)]
    if uneven:
        notes.append(
            f"No change is given for {', '.join(uneven)}: the run before has another number of layers."
        )
    by_id: dict[str, list[int]] = {}
    for number, result in enumerate(results, start=1):
        by_id.setdefault(result.run.checkpoint_id, []).append(number)
    for same in by_id.values():
        if len(same) > 1:
            notes.append(
                f"{', '.join(f'#{n}' for n in same)} have one checkpoint id: they hold the same weights."
            )
    return notes


def left_out_note(left_out: Sequence[int], results: Sequence[AuditResult]) -> str:
    """How many layers `--top` keeps from view, and whether a flagged one is among them."""
    flagged = {layer for result in results for layer in result.flagged}.intersection(left_out)
    tail = f"; flagged among them: {layers_named(flagged)}" if flagged else "; none of them flagged"
    return f"{len(left_out)} left out by --top, of lower score: {layers_named(left_out)}{tail}."


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def _comparable(results: Sequence[AuditResult], number: int) -> bool:
    return results[number].run.num_layers == results[number - 1].run.num_layers


def _gap_change(
    result: AuditResult, verdict: LayerVerdict | None, before: LayerVerdict | None
) -> float | None:
    """That of one reference in both runs where they have been compared, else of those that decided."""
    compared = result.comparison
    if compared is not None and not compared.is_baseline and verdict is not None:
        return next((c.gap_change for c in compared.layers if c.layer == verdict.layer), None)
    return _difference(verdict.gap if verdict else None, before.gap if before else None)


def _difference(value: float | None, before: float | None) -> float | None:
    return None if value is None or before is None else value - before
