"""The report as one HTML page: charts, tables and words in a single file that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec

from peelcli.errors import UsageError
from peelcli.records import AuditResult
from peelcli.records.printable import printable
from peelcli.report import changes, wording
from peelcli.report.matrix import left_out_note
from peelcli.report.page_data import COLUMNS, cells, name, packed, said
from peelcli.report.plain import base_name
from peelcli.report.ranking import shown_layers
from peelcli.report.zones import COLUMNS as ZONE_COLUMNS
from peelcli.report.zones import FIGURES, zone_figures

MISSING = "--format html draws with plotly, which is not installed: pip install 'peelcli[html]'"
COLOURS = {
    "verdict": "verdict",
    "gap": "gap",
    "bits": "bits that suffice",
    "drop": "cost of dropping",
    "fvu": "unexplained",
}


def require_plotly() -> None:
    """Raises UsageError, naming the extra, where the plotting library is missing."""
    if find_spec("plotly") is None:
        raise UsageError(MISSING)


def render_html(results: Sequence[AuditResult], *, top: int | None = None, **_page: object) -> str:
    """`results` as one page in ASCII, below 6 MB for 80 layers × 200 runs; needs plotly (`peelcli[html]`).

    The words and tables of the newest run stand in it as HTML, readable without scripts and on paper; the charts and
    the other runs come from data that a script unpacks. The page's own policy allows these two scripts, by their
    hashes, and no other, no request, and no form. Names and messages may come from an untrusted checkpoint: all are
    escaped or set as text. Raises UsageError where plotly is missing or `top` is below 1.
    """
    require_plotly()
    shown, left_out = shown_layers(results, top)
    page = files("peelcli.report").joinpath("page")
    library, script = _plotly(), page.joinpath("page.js").read_text(encoding="ascii")
    body = [
        *_head(results, page.joinpath("page.css").read_text(encoding="ascii"), (library, script)),
        *_summary(results),
        *_charts(results),
        *_layers(results[-1], len(results), shown, left_out),
        *_changes(results[-1], shown),
        *_next_steps(results[-1], shown),
        *_runs(results),
        "</main>",
        f'<script type="application/gzip" id="data">{packed(results, top)}</script>',
        f"<script>{library}</script>",
        f"<script>{script}</script>",
        "</body></html>",
    ]
    return "\n".join(body) + "\n"


def _head(results: Sequence[AuditResult], css: str, scripts: Iterable[str]) -> Iterator[str]:
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
    title = escaped(f"peel: {base_name(results[-1].run.checkpoint)}")
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<meta name="referrer" content="no-referrer">\n<title>{title}</title>\n<style>\n{css}</style></head>'
    yield f'<body><header><h1>{title}</h1><button id="theme" class="live" hidden>Light / dark</button></header><main>'


def _summary(results: Sequence[AuditResult]) -> Iterator[str]:
    newest = results[-1]
    yield '<section><div id="about">'
    yield f'<p class="{_bad(newest)}">{escaped(wording.headline(newest))}</p><dl>'
    yield from (f"<dt>{escaped(key)}</dt><dd>{escaped(text)}</dd>" for key, text in wording.header(newest))
    yield "</dl>"
    yield from (f"<p>{escaped(sentence)}</p>" for sentence in said(newest))
    yield '</div><p class="live screen" hidden><label>Checkpoint <select id="run"></select></label></p>'
    yield '<noscript><p class="dim">Charts need JavaScript.</p></noscript><p id="status" class="flagged"></p></section>'


def _charts(results: Sequence[AuditResult]) -> Iterator[str]:
    peeled = any(result.network.bounds for result in results)
    if peeled or len(results) > 1:
        note = (
            "Red: blocks that aim at the last state alone do better. Yellow: another peeled path does. Green: none. "
            "The zone of a checkpoint also asks that the trained blocks under a refitted head do not explain it."
        )
        yield _chart("cloud", "The loss among its bounds", note if peeled else "No path was peeled.")
    options = "".join(f'<option value="{key}">{text}</option>' for key, text in COLOURS.items())
    legend = "".join(
        f'<span class="{verdict}">&#9632; {verdict}</span>' for verdict in reversed(wording.MEANINGS)
    )
    if any(result.layers for result in results):
        choice = f'<label class="screen">Colour <select id="colour">{options}</select></label>'
        rest = f'<p class="legend dim">{legend} &#215; flagged. Click a cell for its layer.</p>'
        yield _chart("heat", "Layers and checkpoints", "", f"{choice}{rest}")
        yield '<section class="live" hidden><div id="detail"></div>'
        yield '<button id="unpin" class="screen" hidden>Follow the pointer again</button></section>'
    yield '<div class="grid">'
    if peeled:
        yield _chart(
            "maps",
            "Peeled paths",
            "Red: of a lower loss than the network, and than its trained blocks under a refitted head.",
            '<p id="maps-note"></p>',
        )
    if any(result.layers for result in results):
        yield _chart("gaps", "Gaps", "Above 0 the reference does better. Click for the layer.")
        if len(results) > 1:
            yield _chart(
                "history", "One layer over the checkpoints", "The references that decided may differ."
            )
    yield "</div>"


def _chart(key: str, title: str, note: str, more: str = "") -> str:
    return (
        f'<section class="live" hidden><h2 id="{key}-title">{title}</h2>{more}<div id="{key}" class="chart"></div>'
        f'<p class="dim">{note}</p></section>'
    )


def _layers(
    result: AuditResult, number: int, shown: frozenset[int], left_out: Sequence[int]
) -> Iterator[str]:
    layers = [verdict for verdict in result.layers if verdict.layer in shown]
    head = "".join(f'<th class="{kind}">{header}</th>' for header, kind, _ in COLUMNS)
    yield f'<section class="long"><h2 id="layers-title">Layers of {escaped(name(result, number))}</h2>'
    yield f'<div class="scroll"><table id="layers"><thead><tr>{head}</tr></thead><tbody>'
    for verdict in layers:
        flagged = verdict.layer in result.flagged
        row = []
        for (header, kind, _), cell in zip(COLUMNS, cells(verdict), strict=True):
            kind = verdict.verdict if header == "verdict" else kind
            flag = header == "layer" and flagged
            row.append(
                f'<td class="{kind}{" flagged" if flag else ""}">{"! " if flag else ""}{escaped(cell)}</td>'
            )
        yield f"<tr>{''.join(row)}</tr>"
    yield "</tbody></table></div>"
    notes = [*([left_out_note(left_out, [result])] if left_out else []), wording.GAP]
    yield from (f'<p class="dim">{escaped(note)}</p>' for note in (*notes, wording.COLUMNS, wording.OWN))
    for found, words in wording.meanings(layers):
        yield f'<p><span class="{found}">{found}</span>{escaped(words)}</p>'
    yield "</section>"


def _changes(result: AuditResult, shown: frozenset[int]) -> Iterator[str]:
    if result.comparison is None:
        return
    since = escaped(changes.against(result.comparison))
    yield f'<section class="long"><h2>Changes since {since}</h2><div class="scroll"><table id="changes"><thead><tr>'
    yield '<th class="n">layer</th><th>since then</th><th>was</th><th>is</th><th>change</th><th>measured by</th>'
    yield "</tr></thead><tbody>"
    found = [c for c in result.comparison.layers if c.layer in shown or c.after is None]
    for change in found:
        bad = "flagged" if change.status in ("regressed", "missing") else ""
        cells = "".join(
            f'<td class="{escaped(verdict or "")}">{escaped(verdict or "-")}</td>'
            for verdict in (
                change.before,
                change.after,
            )  # the first may come from a file that is not to be trusted
        )
        cells += "".join(f"<td>{escaped(cell)}</td>" for cell in changes.figures(change))
        yield f'<tr><td class="n">{change.layer}</td><td class="{bad}">{change.status}</td>{cells}</tr>'
    yield "</tbody></table></div>"
    yield from (f"<p>{escaped(line)}</p>" for line in changes.change_lines(result.comparison))
    yield from (f'<p class="dim">{escaped(note)}</p>' for note in changes.column_notes(found))
    yield "</section>"


def _next_steps(result: AuditResult, shown: frozenset[int]) -> Iterator[str]:
    steps = wording.next_steps([verdict for verdict in result.layers if verdict.layer in shown])
    if steps:
        yield f'<section class="long"><h2>What to do next ({escaped(base_name(result.run.checkpoint))})</h2>'
        for verdict, heading, lines in steps:
            words = "".join(f'<p class="step">{escaped(line)}</p>' for line in lines)
            yield f'<p class="{verdict}">{escaped(heading)}</p>{words}'
        yield "</section>"


def _runs(results: Sequence[AuditResult]) -> Iterator[str]:
    if len(results) == 1:
        return
    yield '<section class="long"><h2>Checkpoints</h2><div class="scroll"><table><thead><tr><th>checkpoint</th>'
    yield "".join(f'<th class="n">{header}</th>' for header in FIGURES)
    yield "<th>zone</th><th>outcome</th></tr></thead><tbody>"
    for number, result in enumerate(results, start=1):
        zone = result.network.zone
        yield f'<tr><td class="wide">{escaped(name(result, number))}</td>'
        yield "".join(f'<td class="n">{escaped(cell)}</td>' for cell in zone_figures(result))
        outcome = f'<td class="wide {_bad(result)}">{escaped(wording.headline(result))}</td>'
        yield f'<td class="{zone or ""}">{zone or "-"}</td>{outcome}</tr>'
    yield f'</tbody></table></div><p class="dim">{escaped(ZONE_COLUMNS)}</p></section>'


def _bad(result: AuditResult) -> str:
    return "flagged" if result.flagged or result.network_flagged else ""


def escaped(text: str) -> str:
    """`text` in one line of ASCII that holds no markup, for content and for quoted attributes alike."""
    return html.escape(printable(text)).encode("ascii", "xmlcharrefreplace").decode("ascii")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return _javascript(get_plotlyjs())


@cache
def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("ascii")).digest()).decode("ascii")


def _javascript(source: str) -> str:
    """`source` in ASCII, so that a pipe of any encoding leaves its hash right; it must hold no end of a script."""
    plain = re.sub(r"[^\x00-\x7f]", _escape_sequence, source.replace("\r\n", "\n"))
    return plain.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _escape_sequence(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
