"""The report for people: plain lines and tables, rendered to a string through rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peelcli.records import AuditResult, HistoryEntry, LayerVerdict
from peelcli.report import changes, history, wording
from peelcli.report.cells import STYLES, text
from peelcli.report.layer_table import column_notes, layer_table
from peelcli.report.matrix import comparison_notes, left_out_note, matrices, run_key
from peelcli.report.plain import base_name
from peelcli.report.ranking import shown_layers
from peelcli.report.sparkline import strip_note, strip_table
from peelcli.report.zones import COLUMNS as ZONE_COLUMNS
from peelcli.report.zones import zone_table

MOST_RUNS = 12  # that a series is shown of in full; of more the strip shows how they went
NARROWEST = 40  # columns; below this nothing is readable, and lines run over instead
EARLIER = (
    "Of the runs #1 to #{last} only the lines above and the strip are shown, of the newest {most} everything; --format "
    "csv, json and html hold all."
)


def render_table(
    results: Sequence[AuditResult],
    *,
    top: int | None = None,
    width: int = 80,
    color: bool = False,
    unicode: bool = False,
) -> str:
    """`results` as text of at most `width` columns (40 or more), with ANSI colours where `color` is set.

    All of it is ASCII but names, and with `unicode` the blocks of the trends.

    Several results are compared side by side, in the order given. `top` shows the layers of the highest score
    only and says which it leaves out. Names and messages are escaped: they may come from an untrusted
    checkpoint. Raises UsageError where `top` is below 1 and ValueError where there are no results.
    """
    if not results:
        raise ValueError("no results to render: expected at least one AuditResult")
    out = StringIO()
    console = plain_console(out, width, color)
    shown, left_out = shown_layers(results, top)
    if len(results) == 1:
        _single(console, results[0], shown, left_out)
    else:
        _several(console, results, shown, left_out, unicode=unicode)
    return without_trailing(out.getvalue())


def render_history(
    entries: Sequence[HistoryEntry], *, width: int = 80, color: bool = False, unicode: bool = False
) -> str:
    """The audits of a history, oldest first, as text of at most `width` columns: a line of bars for each layer."""
    out = StringIO()
    console = plain_console(out, width, color)
    console.print(text("History", "bold"))
    paragraphs(console, history.history_lines(entries))
    console.print()
    console.print(history.history_table(entries, console.width, unicode=unicode))
    console.print()
    paragraphs(console, [history.NOTE], "dim")
    return without_trailing(out.getvalue())


def without_trailing(rendered: str) -> str:
    """`rendered` without spaces at the ends of its lines, and with one newline at its own."""
    return "\n".join(line.rstrip() for line in rendered.rstrip().split("\n")) + "\n"


def plain_console(out: StringIO, width: int, color: bool) -> Console:
    """A console that reads nothing from the environment: what it would look for there is said here."""
    return Console(
        file=out,
        width=max(width, NARROWEST),
        height=100,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        legacy_windows=False,
        force_jupyter=False,
        markup=False,
        highlight=False,
        emoji=False,
    )


def _single(console: Console, result: AuditResult, shown: frozenset[int], left_out: tuple[int, ...]) -> None:
    _headline(console, f"{base_name(result.run.checkpoint)}: ", result)
    console.print()
    console.print(_header(wording.header(result)))
    layers = [verdict for verdict in result.layers if verdict.layer in shown]
    if layers:
        console.print()
        console.print(layer_table(result, layers, console.width))
        console.print()
        paragraphs(console, [left_out_note(left_out, [result])] if left_out else [])
        paragraphs(console, column_notes(console.width), "dim")
        _meanings(console, layers)
    _changes(console, result, shown)
    _notes(console, result, layers)


def _several(
    console: Console,
    results: Sequence[AuditResult],
    shown: frozenset[int],
    left_out: tuple[int, ...],
    *,
    unicode: bool,
) -> None:
    console.print(text(f"{len(results)} runs", "bold"))
    console.print(run_key(results))
    headers = [wording.header(result) for result in results]
    shared = [line for line in headers[0] if all(line in header for header in headers)]
    if shared:
        console.print()
        console.print(_header(shared))
    start = max(len(results) - MOST_RUNS, 0)
    if start:
        console.print()
        paragraphs(console, [EARLIER.format(most=MOST_RUNS, last=start)])
    zones = zone_table(results, console.width, start)
    if zones is not None:
        console.print()
        console.print(zones)
        console.print()
        paragraphs(console, [ZONE_COLUMNS], "dim")
    strip = strip_table(results, sorted(shown), console.width, unicode=unicode)
    if strip is not None:
        console.print()
        console.print(strip)
        console.print()
        paragraphs(console, [strip_note(results, console.width)], "dim")
    for table in matrices(console, results, sorted(shown), start):
        console.print()
        console.print(table)
    console.print()
    paragraphs(console, [left_out_note(left_out, results)] if left_out else [])
    paragraphs(console, comparison_notes(results), "dim")
    _meanings(console, [v for result in results for v in result.layers if v.layer in shown], by_layer=False)
    _changes(console, results[-1], shown)
    for number, result in enumerate(results[start:], start=start + 1):
        console.print()
        _headline(console, f"#{number} {base_name(result.run.checkpoint)}: ", result)
        console.print(_header([line for line in wording.header(result) if line not in shared]))
        _notes(console, result, [verdict for verdict in result.layers if verdict.layer in shown])


def _changes(console: Console, result: AuditResult, shown: frozenset[int]) -> None:
    """What changed from what the newest run is compared with."""
    table = changes.change_table(result, shown)
    if table is None or result.comparison is None:
        return
    heading(console, f"Changes since {changes.against(result.comparison)}")
    console.print(table)
    console.print()
    paragraphs(console, changes.column_notes(result.comparison.layers), "dim")
    paragraphs(console, changes.change_lines(result.comparison))


def _headline(console: Console, name: str, result: AuditResult) -> None:
    style = "bold red" if result.flagged or result.network_flagged else "bold"
    console.print(Text.assemble(text(name, "bold"), text(wording.headline(result), style)))


def _header(lines: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, sentence in lines:
        grid.add_row(text(name, "bold"), text(sentence))
    return grid


def _meanings(console: Console, layers: Sequence[LayerVerdict], *, by_layer: bool = True) -> None:
    console.print()
    for verdict, words in wording.meanings(layers, by_layer=by_layer):
        console.print(Text.assemble(text(verdict, STYLES[verdict]), text(words)))


def _notes(console: Console, result: AuditResult, layers: Sequence[LayerVerdict]) -> None:
    """What to do next, and everything else that is said in words."""
    steps = wording.next_steps(layers)
    if steps:
        heading(console, "What to do next")
        for verdict, title, lines in steps:
            console.print(text(title, STYLES[verdict]))
            for line in lines:
                console.print(Padding(text(line), (0, 0, 0, 2)))
    for title, sentences in (
        ("Network", wording.network_lines(result)),
        ("Scan of the files", [wording.finding(found) for found in result.run.findings]),
        ("Not audited", result.run.skipped),
    ):
        if sentences:
            heading(console, title)
            paragraphs(console, sentences)


def heading(console: Console, title: str) -> None:
    """A title on a line of its own, after an empty one."""
    console.print()
    console.print(text(title, "bold"))


def paragraphs(console: Console, sentences: Iterable[str], style: str = "") -> None:
    """Each of `sentences` from a line of its own on."""
    for sentence in sentences:
        console.print(text(sentence, style))
