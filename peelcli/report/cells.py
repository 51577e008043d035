"""The pieces that the table is put together from; every string that is shown passes through `text`."""

from __future__ import annotations

from rich.box import Box
from rich.table import Table
from rich.text import Text

from peelcli.records.printable import printable

STYLES = {
    "broken": "bold red",
    "surpassed": "red",
    "matched": "yellow",
    "undecided": "cyan",
    "effective": "green",
}
# A header rule in ASCII and nothing else: no blank edges, and safe in any encoding.
RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def text(content: str, style: str = "") -> Text:
    """`content` as it stands: no markup is read in it, and none of it reaches the terminal as a command."""
    return Text(printable(content), style=style)


def verdict_text(verdict: str) -> Text:
    """A verdict in its colour; the word alone must do where there is none."""
    return text(verdict, STYLES[verdict])


def ruled_table(gutter: int = 1) -> Table:
    """An empty table with a header rule and `gutter` spaces, at least one, between columns."""
    padding = (0, gutter - 1, 0, 0)  # the box itself divides columns by one space
    return Table(box=RULED, padding=padding, pad_edge=False, show_edge=False, header_style="bold")
