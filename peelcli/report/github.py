"""The report as workflow commands of GitHub Actions: an annotation for each flagged layer and network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peelcli.records import VERDICTS, AuditResult
from peelcli.records.printable import printable
from peelcli.report import changes, wording
from peelcli.report.plain import base_name, layers_named
from peelcli.report.ranking import shown_layers

MOST = 10  # annotations of one level that GitHub keeps of a step; what comes after is lost without a word


def render_github(results: Sequence[AuditResult], *, top: int | None = None, **_page: object) -> str:
    """An `error` for each flagged network and layer, a `warning` for each finding, a `notice` on each run.

    The newest run's come first. Of more than ten of one level the tenth counts those that GitHub would drop. Raises
    UsageError where `top` is below 1; what it leaves out is counted in the notice.
    """
    shown, left_out = shown_layers(results, top)
    errors = [error for result in reversed(results) for error in _errors(result, shown)]
    warnings = [warning for result in reversed(results) for warning in _warnings(result)]
    notices = [_notice(result, left_out) for result in reversed(results)]
    return "".join(
        f"::{level} title={_escaped(title, ':,')}::{_escaped(message)}\n"
        for level, found in (("error", errors), ("warning", warnings), ("notice", notices))
        for title, message in _at_most(found)
    )


def _errors(result: AuditResult, shown: frozenset[int]) -> Iterator[tuple[str, str]]:
    """Title and message of each annotation: the network's, then the layers', the worst verdict first."""
    name = base_name(result.run.checkpoint)
    if result.network_flagged:
        said = " ".join(wording.network_lines(result)) or wording.headline(result)
        yield f"peel: network {', '.join(wording.network_flags(result))}", f"{name}: {said}"
    flagged = [v for v in result.layers if v.layer in result.flagged and v.layer in shown]
    for verdict in sorted(flagged, key=lambda v: (VERDICTS.index(v.verdict), v.layer)):
        title = f"peel: layer {verdict.layer} {changes.outcome(result, verdict)}"
        yield title, f"{name}, layer {verdict.layer}: {' '.join(changes.words(result, verdict))}"


def _warnings(result: AuditResult) -> Iterator[tuple[str, str]]:
    for found in wording.notes_on_files(result):
        yield f"peel: {found.kind}", f"{base_name(result.run.checkpoint)}: {wording.finding(found)}"


def _notice(result: AuditResult, left_out: Sequence[int]) -> tuple[str, str]:
    undecided = [v for v in result.layers if v.verdict == "undecided" and v.layer not in result.flagged]
    tail = f"; undecided: {layers_named(v.layer for v in undecided)}" if undecided else ""
    tail += f"; left out by --top: {layers_named(left_out)}" if left_out else ""
    return "peel", f"{wording.checkpoint(result)}: {wording.headline(result)}{tail}"


def _at_most(found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    if len(found) <= MOST:
        return list(found)
    rest = found[MOST - 1 :]
    titles = "; ".join(f"{message.partition(': ')[0]}" for _, message in rest)
    return [*found[: MOST - 1], (f"peel: {len(rest)} more", f"{titles} (GitHub shows {MOST} of a step)")]


def _escaped(text: str, also: str = "") -> str:
    """`text` in one line, with what the runner would read as its own written in percents; `also` in properties."""
    text = printable(text).replace("%", "%25")
    for char in also:
        text = text.replace(char, f"%{ord(char):02X}")
    return text
