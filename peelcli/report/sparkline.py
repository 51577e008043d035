"""A series at a glance: for each layer one sign a checkpoint, and how its gap went."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from peelcli.records import VERDICTS, AuditResult, LayerVerdict
from peelcli.report.cells import STYLES, ruled_table, text
from peelcli.report.plain import fixed, signed
from peelcli.report.zones import STYLES as ZONE_STYLES

FEWEST = 3  # runs; of two the columns side by side say it all
SIGNS = {"effective": ".", "undecided": "?", "matched": "m", "surpassed": "s", "broken": "b"}
ZONES = ("red", "yellow", "green")  # the worst first, as VERDICTS are
LEVELS, PLAIN_LEVELS = "·▁▂▃▄▅▆▇█", " _.-~=+*#"  # the first where there is no value
OTHERS = 32  # columns that a row takes beside its strip and its trend
NOTE = (
    "strip: oldest first; . effective, ? undecided, m matched, s surpassed, b broken, in capitals where flagged, - not "
    "audited; of the network r, y, g for its zone. trend: of the gap, and of the CE, each between its least and most"
)


def strip_table(
    results: Sequence[AuditResult], layers: Sequence[int], width: int, *, unicode: bool
) -> Table | None:
    """A row for the network and for each of `layers`; None where there are fewer than three runs.

    Where a row has no room for all runs, one sign stands for several: for the worst of them.
    """
    if len(results) < FEWEST:
        return None
    groups = _groups(results, width)
    table = ruled_table(gutter=2)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("strip", no_wrap=True)
    table.add_column("trend", no_wrap=True)
    table.add_column("last", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    levels = levels_of(unicode)
    newest, losses = results[-1].network, [result.network.ce for result in results]
    zone = text(newest.zone or "-", ZONE_STYLES.get(newest.zone or "", ""))
    bars = trend(_last(losses, groups), levels, 0.01)
    table.add_row(text("CE"), _zones(results, groups), text(bars), text(fixed(newest.ce)), zone)
    rows = {layer: [_of(result, layer) for result in results] for layer in layers}
    gaps = {layer: [v.gap if v else None for v in row] for layer, row in rows.items()}
    known = [gap for row in gaps.values() for gap in row if gap is not None and math.isfinite(gap)]
    least_span = 0.1 * (max(known) - min(known)) if known else 0.0  # noise is not to fill the column
    for layer, row in rows.items():
        last = row[-1]
        bars = trend(_last(gaps[layer], groups), levels, least_span)
        verdict = text(last.verdict, STYLES[last.verdict]) if last else text("-")
        gap = text(signed(last.gap) if last else "-")
        table.add_row(text(str(layer)), _verdicts(row, results, groups), text(bars), gap, verdict)
    return table


def strip_note(results: Sequence[AuditResult], width: int) -> str:
    """What the signs mean, and for how many checkpoints one stands."""
    most = max(len(group) for group in _groups(results, width))
    return f"{NOTE}." if most == 1 else f"{NOTE}. One sign is the worst of up to {most} checkpoints."


def levels_of(unicode: bool) -> str:
    """The signs of a sparkline: that of no value, then from the least to the most."""
    return LEVELS if unicode else PLAIN_LEVELS


def trend(values: Sequence[float | None], levels: str, least_span: float) -> str:
    """A sparkline from the least of `values` to the most.

    Where they differ by less than `least_span` they are drawn in the middle of a span as large.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return ""
    span = max(max(known) - min(known), least_span)
    low = (max(known) + min(known) - span) / 2
    return sparkline(values, levels, low, low + span)


def sparkline(values: Sequence[float | None], levels: str, low: float, high: float) -> str:
    """A sign for each value, from the second of `levels` for `low` to the last for `high`; the first for None."""
    top = len(levels) - 2

    def sign(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return levels[0]
        share = (value - low) / (high - low) if high > low else 0.5
        return levels[1 + round(min(max(share, 0.0), 1.0) * top)]

    return "".join(map(sign, values))


def _groups(results: Sequence[AuditResult], width: int) -> list[range]:
    """The numbers of the runs that share a sign: as many groups as there is room for, the last the newest."""
    room = max((width - OTHERS) // 2, 4)
    each = math.ceil(len(results) / room)
    ends = range(len(results), 0, -each)
    return [range(max(end - each, 0), end) for end in ends][::-1]


def _last(values: Sequence[float | None], groups: Sequence[range]) -> list[float | None]:
    return [values[group[-1]] for group in groups]


def _of(result: AuditResult, layer: int) -> LayerVerdict | None:
    return next((verdict for verdict in result.layers if verdict.layer == layer), None)


def _verdicts(
    row: Sequence[LayerVerdict | None], results: Sequence[AuditResult], groups: Sequence[range]
) -> Text:
    strip = Text()
    for group in groups:
        found = [(verdict, verdict.layer in results[n].flagged) for n in group if (verdict := row[n])]
        if not found:
            strip.append("-")
            continue
        worst, flagged = min(found, key=lambda pair: (not pair[1], VERDICTS.index(pair[0].verdict)))
        sign = SIGNS[worst.verdict]
        style = STYLES[worst.verdict]
        strip.append(sign.upper() if flagged else sign, f"{style} reverse" if flagged else style)
    return strip


def _zones(results: Sequence[AuditResult], groups: Sequence[range]) -> Text:
    strip = Text()
    for group in groups:
        found = [(zone, results[n].network_flagged) for n in group if (zone := results[n].network.zone)]
        if not found:
            strip.append("-")
            continue
        worst, flagged = min(found, key=lambda pair: (ZONES.index(pair[0]), not pair[1]))
        sign = worst[0].upper() if flagged else worst[0]
        strip.append(sign, f"{ZONE_STYLES[worst]} reverse" if flagged else ZONE_STYLES[worst])
    return strip
