"""One run: a row for each layer, with as many columns as the width holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from peelcli.records import AuditResult, LayerVerdict
from peelcli.report import wording
from peelcli.report.cells import ruled_table, text, verdict_text
from peelcli.report.plain import bracketed, fixed, gap_with_interval, short, signed

NARROW, WIDE = 76, 110  # below the first only what decides; from the second the interval's ends and the score


@dataclass(frozen=True)
class Column:
    """A header, and the cell of a layer; `wraps` where the cell may take a second line."""

    header: str
    cell: Callable[[LayerVerdict], str | Text]
    justify: Literal["left", "right"] = "right"
    wraps: bool = False


VERDICT = Column("verdict", lambda v: verdict_text(v.verdict), justify="left")
GAP = Column("gap", lambda v: gap_with_interval(v.gap, v.gap_interval), justify="left", wraps=True)
DECIDED = Column(
    "decided by", lambda v: wording.reference(v.reference, brief=True), justify="left", wraps=True
)
BITS = Column("bits", lambda v: short(v.effective_bits))
FVU = Column("fvu", lambda v: fixed(v.fvu))
DROP = Column("drop", lambda v: signed(v.drop_cost))
BLAME = Column("blame", lambda v: wording.sublayer(v.sublayer, brief=True), justify="left")

COLUMNS: dict[str, tuple[Column, ...]] = {
    "narrow": (VERDICT, GAP, DECIDED),
    "normal": (VERDICT, GAP, DECIDED, BITS, FVU, DROP, BLAME),
    "wide": (
        VERDICT,
        Column("gap", lambda v: signed(v.gap)),
        Column("interval", lambda v: bracketed(v.gap_interval), justify="left"),
        Column("decided by", lambda v: wording.reference(v.reference), justify="left", wraps=True),
        BITS,
        Column("own", lambda v: short(v.own_bits)),
        FVU,
        DROP,
        Column("blame", lambda v: wording.sublayer(v.sublayer), justify="left"),
        Column("score", lambda v: signed(v.score)),
    ),
}


def layer_table(result: AuditResult, layers: Sequence[LayerVerdict], width: int) -> Table:
    """`layers` of `result` in the order given; `!` marks the flagged ones."""
    columns = COLUMNS["narrow" if width < NARROW else "normal" if width < WIDE else "wide"]
    table = ruled_table(gutter=1 if width < WIDE else 2)
    table.add_column("layer", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column.header, justify=column.justify, no_wrap=not column.wraps, overflow="fold")
    for verdict in layers:
        flagged = verdict.layer in result.flagged
        name = text(f"{'! ' if flagged else ''}{verdict.layer}", "bold red" if flagged else "")
        cells = (column.cell(verdict) for column in columns)
        table.add_row(name, *(cell if isinstance(cell, Text) else text(cell) for cell in cells))
    return table


def column_notes(width: int) -> list[str]:
    """What the column headers mean at this width."""
    if width < NARROW:
        return [wording.GAP]
    return [wording.GAP, wording.COLUMNS, *([wording.OWN] if width >= WIDE else [])]
