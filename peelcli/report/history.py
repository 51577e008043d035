"""A history of audits as text: a line for each layer, with its score over time."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from peelcli.records import HistoryEntry, HistoryLayer
from peelcli.report.cells import STYLES, ruled_table, text
from peelcli.report.plain import base_name, fixed, gap_with_interval, layers_named
from peelcli.report.sparkline import levels_of, sparkline

LOWEST, HIGHEST = -1.0, 1.0  # of the score: half as much again as usual, and idle
TAKEN = 54  # columns of a line beside the bars, at most
NOTE = (
    "score over time, newest on the right: low where the layer does its work, full where it is idle or does harm; x "
    "where it is broken, a dot or a space where it was not audited. loss: the network's, from its least to its most."
)


def history_lines(entries: Sequence[HistoryEntry]) -> list[str]:
    """What the history holds, and which audits were flagged."""
    first, last = entries[0], entries[-1]
    count = f"{len(entries)} audit{'s' if len(entries) > 1 else ''}"
    lines = [f"{count}, {first.time[:10]} to {last.time[:10]}; the newest: {_name(last)}, {_outcome(last)}"]
    flagged = [entry for entry in entries[:-1] if entry.flagged]
    if flagged:
        named = "; ".join(f"{_name(entry)} ({_outcome(entry)})" for entry in flagged[-3:])
        lines.append(f"Flagged before: {len(flagged)} of {len(entries) - 1}, the last of them {named}")
    return lines


def history_table(entries: Sequence[HistoryEntry], width: int, *, unicode: bool) -> Table:
    """A row for the loss and one for each layer, the worst of the newest audit marked."""
    shown = entries[-max(8, width - TAKEN) :]
    table = ruled_table()
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("over time", no_wrap=True)
    table.add_column("newest", no_wrap=True)
    table.add_column("gap", overflow="fold")
    losses, levels = [entry.network.ce for entry in shown], levels_of(unicode)
    known = [loss for loss in losses if loss is not None]
    if known:
        bars = sparkline(losses, levels, min(known), max(known))
        table.add_row("loss", text(bars), "", text(fixed(losses[-1])))
    by_layer = [{layer.layer: layer for layer in entry.layers} for entry in shown]
    for number in sorted({n for layers in by_layer for n in layers}):
        newest = by_layer[-1].get(number)
        table.add_row(*_row(number, [layers.get(number) for layers in by_layer], newest, levels))
    return table


def _row(
    number: int, past: Sequence[HistoryLayer | None], newest: HistoryLayer | None, levels: str
) -> list[Text]:
    signs = "".join(
        "x"
        if layer and layer.verdict == "broken"
        else sparkline([layer.score if layer else None], levels, LOWEST, HIGHEST)
        for layer in past
    )
    flagged = newest is not None and newest.flagged
    verdict = newest.verdict if newest else "-"
    return [
        text(f"{'! ' if flagged else ''}{number}", "bold red" if flagged else ""),
        text(signs),
        text(verdict, STYLES.get(verdict, "")),
        text(gap_with_interval(newest.gap, newest.gap_interval) if newest else "-"),
    ]


def _name(entry: HistoryEntry) -> str:
    return base_name(entry.checkpoint) + ("" if entry.step is None else f" (step {entry.step})")


def _outcome(entry: HistoryEntry) -> str:
    if not entry.flagged:
        return "nothing flagged"
    return f"{layers_named(entry.flagged_layers)} flagged" if entry.flagged_layers else "the network flagged"
