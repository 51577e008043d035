"""The report as JUnit XML, as CI systems read it: a suite for each checkpoint, a case for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from peelcli.records import AuditResult, LayerVerdict
from peelcli.records.printable import printable
from peelcli.report import changes, wording
from peelcli.report.plain import base_name
from peelcli.report.ranking import shown_layers


def render_junit(results: Sequence[AuditResult], *, top: int | None = None, **_page: object) -> str:
    """`results` as XML that satisfies the schemas of Ant (windyroad's) and of Jenkins' xUnit plugin.

    A flagged layer fails, an undecided one is skipped, any other passes; the network is a case of its own. Pure
    ASCII, so that no encoding on the way can spoil it. The timestamp is that of the rendering, in UTC. Raises
    UsageError where `top` is below 1.
    """
    shown, _ = shown_layers(results, top)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    root = Element("testsuites")
    for number, result in enumerate(results):
        root.append(_suite(result, number, now, shown))
    ElementTree.indent(root)
    text: str = ElementTree.tostring(root, encoding="us-ascii", xml_declaration=True).decode("ascii")
    return text.rstrip("\n") + "\n"


def _suite(result: AuditResult, number: int, now: str, shown: frozenset[int]) -> Element:
    cases = [_network(result)]
    cases += [_layer(verdict, result) for verdict in result.layers if verdict.layer in shown]
    count = {kind: str(sum(case.find(kind) is not None for case in cases)) for kind in ("failure", "skipped")}
    suite = Element(
        "testsuite",
        name=_token(wording.checkpoint(result)),
        package="peel",
        id=str(number),
        timestamp=now,
        hostname="localhost",  # as the schema asks where the host does not matter
        tests=str(len(cases)),
        failures=count["failure"],
        errors="0",
        skipped=count["skipped"],
        time=_seconds(result.run.seconds),
    )
    properties = SubElement(suite, "properties")
    for name, sentence in wording.header(result):
        SubElement(properties, "property", name=name, value=printable(sentence))
    suite.extend(cases)
    SubElement(suite, "system-out").text = _lines(
        [wording.headline(result), *wording.network_lines(result), *map(wording.finding, result.run.findings)]
    )
    SubElement(suite, "system-err").text = _lines(result.run.skipped)
    return suite


def _network(result: AuditResult) -> Element:
    paths = result.run.paths
    case = _case(result, "network", paths.seconds if paths else 0.0)
    if result.network_flagged:
        flags = ", ".join(wording.network_flags(result)) or "flagged"
        said = wording.network_lines(result) or [wording.headline(result)]
        _outcome(case, "failure", f"network: {flags}", flags, said)
    return case


def _layer(verdict: LayerVerdict, result: AuditResult) -> Element:
    fits = (s.fit.seconds for s in result.run.scores if s.reference.layer == verdict.layer)
    case = _case(result, f"layer {verdict.layer}", sum(fits))
    said, outcome = changes.words(result, verdict), changes.outcome(result, verdict)
    message = f"layer {verdict.layer} {outcome}: {' '.join(said[:1])}"
    if verdict.layer in result.flagged:
        _outcome(case, "failure", message, outcome, said)
    elif verdict.verdict == "undecided":
        _outcome(case, "skipped", message, outcome, said)
    return case


def _case(result: AuditResult, name: str, seconds: float) -> Element:
    # CI systems part packages at dots
    classname = "peel." + base_name(result.run.checkpoint).replace(".", "_")
    return Element("testcase", name=name, classname=_token(classname), time=_seconds(seconds))


def _outcome(case: Element, kind: str, message: str, type_: str, lines: Sequence[str]) -> None:
    SubElement(case, kind, message=printable(message), type=printable(type_)).text = _lines(lines)


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(map(printable, lines))


def _token(text: str) -> str:
    """Without spaces at the ends or several in a row, as the schema's names are."""
    return " ".join(printable(text).split())


def _seconds(seconds: float) -> str:
    return f"{max(seconds, 0.0) if math.isfinite(seconds) else 0.0:.3f}"
