"""The report as GitHub-flavoured Markdown, for `$GITHUB_STEP_SUMMARY`, a comment or a wiki page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from peelcli.records import AuditResult, LayerVerdict
from peelcli.records.printable import printable
from peelcli.report import changes, wording
from peelcli.report.matrix import left_out_note
from peelcli.report.plain import base_name, bracketed, fixed, short, signed
from peelcli.report.ranking import shown_layers

LARGEST = 1_000_000  # bytes; GitHub refuses a summary above 1 MiB whole
MARKS = {"broken": "🛑", "surpassed": "🔴", "matched": "🟡", "undecided": "🔵", "effective": "🟢"}
ZONE_MARKS = {"red": "🔴", "yellow": "🟡", "green": "🟢"}
# A colon does something only before more: around the name of an emoji, and in an address.
_ACTIVE = re.compile(r"[\\`*_\[\]|~$#^]|:(?=[^\s/])")
_ADDRESS = re.compile(r"@|:(?=/)|(?<=www)\.", re.IGNORECASE)
_BEGINS_BLOCK = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[-+=]))(.)")


def render_markdown(results: Sequence[AuditResult], *, top: int | None = None, **_page: object) -> str:
    """`results` as Markdown of at most 1 MB: a table of the runs where there are several, then each, newest first.

    What does not fit is left out from the end, whole lines at a time, and that is said. Names and messages may come
    from an untrusted checkpoint: nothing in them is read as Markdown, HTML, a link or a mention. Raises UsageError
    where `top` is below 1.
    """
    shown, left_out = shown_layers(results, top)
    lines = [f"## peel: {_headline(results)}", ""]
    if len(results) > 1:
        lines += [*_table(("run", "step", "CE", "zone", "outcome"), ">>>  ", map(_of_run, results)), ""]
    for result in reversed(results):
        lines += _section(result, shown, left_out)
    return _fitting(lines)


def _headline(results: Sequence[AuditResult]) -> str:
    if len(results) == 1:
        return f"{_name(results[0])}: {escaped(wording.headline(results[0]))}"
    flagged = sum(bool(result.flagged or result.network_flagged) for result in results)
    return f"{flagged} of {len(results)} runs flagged"


def _of_run(result: AuditResult) -> list[str]:
    run, network = result.run, result.network
    zone = "-" if network.zone is None else f"{ZONE_MARKS[network.zone]} {network.zone}"
    step = "-" if run.step is None else str(run.step)
    return [_name(result), step, fixed(network.ce), zone, escaped(wording.headline(result))]


def _section(result: AuditResult, shown: frozenset[int], left_out: Sequence[int]) -> Iterator[str]:
    yield from (f"### {_name(result)}", "")
    yield from (f"- **{name}** {escaped(sentence)}" for name, sentence in wording.header(result))
    layers = [verdict for verdict in result.layers if verdict.layer in shown]
    if layers:
        yield ""
        columns = ("layer", "verdict", "gap", "interval", "decided by", "bits", "fvu", "drop", "blame")
        yield from _table(columns, "> >  >>> ", (_of_layer(verdict, result) for verdict in layers))
        notes = [*([left_out_note(left_out, [result])] if left_out else []), wording.GAP]
        yield from ("", *(f"<sub>{escaped(note)}</sub>" for note in [" ".join([*notes, wording.COLUMNS])]))
        yield ""
        yield from (f"- **{verdict}** {escaped(words)}" for verdict, words in wording.meanings(layers))
    yield from _changes(result, shown)
    for title, sentences in (
        ("Network", wording.network_lines(result)),
        ("Scan of the files", [wording.finding(found) for found in result.run.findings]),
        ("Not audited", result.run.skipped),
    ):
        if sentences:
            yield from ("", f"#### {title}", "")
            yield from (f"- {escaped(sentence)}" for sentence in sentences)
    steps = wording.next_steps(layers)
    if steps:
        yield from ("", "#### What to do next", "")
        for verdict, heading, words in steps:
            yield f"- {MARKS[verdict]} **{escaped(heading)}** {' '.join(map(escaped, words))}"
    yield ""


def _changes(result: AuditResult, shown: frozenset[int]) -> Iterator[str]:
    """What changed since the run before or a baseline: a row for each layer of which something can be said."""
    if result.comparison is None:
        return
    yield from ("", f"#### Changes since {escaped(changes.against(result.comparison))}", "")
    found = [c for c in result.comparison.layers if c.layer in shown or c.after is None]
    rows = (
        [str(c.layer), c.status, *map(escaped, (c.before or "-", c.after or "-", *changes.figures(c)))]
        for c in found
    )
    yield from _table(("layer", "since then", "was", "is", "change", "measured by"), ">     ", rows)
    yield from ("", f"<sub>{escaped(' '.join(changes.column_notes(found)))}</sub>", "")
    yield from (f"- {escaped(line)}" for line in changes.change_lines(result.comparison))


def _of_layer(verdict: LayerVerdict, result: AuditResult) -> list[str]:
    flagged = verdict.layer in result.flagged
    return [
        f"**{verdict.layer}**" if flagged else str(verdict.layer),
        f"{MARKS[verdict.verdict]} {verdict.verdict}{' **!**' if flagged else ''}",
        signed(verdict.gap),
        escaped(bracketed(verdict.gap_interval)),
        escaped(wording.reference(verdict.reference)),
        short(verdict.effective_bits),
        fixed(verdict.fvu),
        signed(verdict.drop_cost),
        wording.sublayer(verdict.sublayer),
    ]


def _table(header: Sequence[str], aligned: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """`aligned` has `>` for each column that is right-aligned."""
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join('--:' if side == '>' else '---' for side in aligned)}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _name(result: AuditResult) -> str:
    """The checkpoint's name as code, in which GitHub looks for neither mentions nor links."""
    return f"<code>{escaped(base_name(result.run.checkpoint))}</code>"


def escaped(text: str) -> str:
    """`text` in one line in which nothing is active: markup, HTML, autolinks, mentions, emoji names, formulas."""
    text = _ACTIVE.sub(r"\\\g<0>", " ".join(printable(text).split()))
    text = _BEGINS_BLOCK.sub(r"\1\\\2", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # No escape keeps GitHub from seeing a mention or an address in the text; an element of its own does.
    return _ADDRESS.sub(r"<span>\g<0></span>", text)


def _fitting(lines: Sequence[str]) -> str:
    kept, size = [], 0
    for number, line in enumerate(lines):
        size += len(line.encode()) + 1
        if size > LARGEST - 200:
            kept += ["", f"*{len(lines) - number} more lines are left out: a summary holds 1 MiB at most.*"]
            break
        kept.append(line)
    return "\n".join(kept).rstrip("\n") + "\n"
