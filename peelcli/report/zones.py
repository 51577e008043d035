"""The zone of each network, and the losses of its peeled paths beside its own."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from peelcli.records import AuditResult
from peelcli.report.cells import ruled_table, text
from peelcli.report.plain import fixed

STYLES = {"red": "bold red", "yellow": "yellow", "green": "green"}
MEANINGS = {
    "red": "blocks fitted to the last states alone do better: training is ineffective",
    "yellow": "a better network of the class is at hand",
    "green": "no peeled path does better",
}
COLUMNS = (
    "head: CE of the trained blocks under a refitted head, the control that every bound is held against. last: CE of "
    "blocks that all aim at the last state. YES: of the best map, chosen on other text. least: the least YES bound so "
    "far. maps: those of a higher CE than the network's."
)
FIGURES = ("step", "CE", "head", "last", "YES", "least", "maps")
NARROW = 64  # columns; below this only the step, the loss and its bound
MOST_TARGETS = 12  # of a map that is written out in a line


def zone_sentence(result: AuditResult) -> str | None:
    """The zone and what it rests on; None where no path was peeled."""
    network = result.network
    bounds = network.bounds
    if bounds is None:
        return None
    zone = "not settled" if network.zone is None else f"{network.zone}: {MEANINGS[network.zone]}"
    last = "" if bounds.last is None else f", with the last state as the only target {fixed(bounds.last.ce)}"
    return (
        f"{zone}. Peeled paths: CE {fixed(bounds.yes.ce)} at best (map {map_text(bounds.yes.target_map)} of "
        f"{bounds.peeled}){last}; the trained blocks under a refitted head {fixed(bounds.control)}"
    )


def map_text(target_map: Sequence[int]) -> str:
    """`[1, 3, 3]`; runs of a long map as `[1, 12 x11]`."""
    if len(target_map) <= MOST_TARGETS:
        return str(list(target_map))
    runs: list[list[int]] = []
    for target in target_map:
        if runs and runs[-1][0] == target:
            runs[-1][1] += 1
        else:
            runs.append([target, 1])
    ends = [f"{target} x{count}" if count > 1 else str(target) for target, count in runs]
    return "[" + ", ".join(ends if len(ends) <= MOST_TARGETS else [*ends[:4], "...", *ends[-4:]]) + "]"


def zone_table(results: Sequence[AuditResult], width: int, start: int = 0) -> Table | None:
    """A row for each run from `start`: step, loss, bounds and zone; None where none of them was peeled."""
    if not any(result.network.bounds for result in results[start:]):
        return None
    shown = FIGURES if width >= NARROW else ("step", "CE", "YES")
    table = ruled_table(gutter=2)
    table.add_column("")
    for header in shown:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("zone", no_wrap=True)
    for number, result in enumerate(results[start:], start=start + 1):
        zone = result.network.zone
        cells = dict(zip(FIGURES, zone_figures(result), strict=True))
        row: list[Text] = [text(cells[header]) for header in shown]
        table.add_row(text(f"#{number}", "bold"), *row, text(zone or "-", STYLES.get(zone or "", "")))
    return table


def zone_figures(result: AuditResult) -> tuple[str, ...]:
    """The cells under `FIGURES`."""
    bounds, ce = result.network.bounds, fixed(result.network.ce)
    step = "-" if result.run.step is None else str(result.run.step)
    if bounds is None:
        return (step, ce, *["-"] * 5)
    last = None if bounds.last is None else bounds.last.ce
    reached = map(fixed, (bounds.control, last, bounds.yes.ce, bounds.running_minimum))
    return (step, ce, *reached, f"{bounds.beaten}/{bounds.peeled}")
