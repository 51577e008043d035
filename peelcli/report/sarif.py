"""The report as SARIF 2.1.0, which code scanning services read: a result for each layer that is not effective."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from peelcli import __version__
from peelcli.records import AuditResult, LayerVerdict
from peelcli.records.printable import printable
from peelcli.report import changes, wording
from peelcli.report.plain import base_name
from peelcli.report.ranking import shown_layers
from peelcli.report.zones import MEANINGS as ZONES

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
RULES = {
    **{f"layer-{verdict}": words for verdict, words in wording.MEANINGS.items() if verdict != "effective"},
    "layer-regressed": "it does worse against the same reference than at the run before or the baseline, beyond chance",
    "layer-missing": "it was audited at the run before or the baseline, and is not now",
    **{f"network-{flag}": words for flag, words in wording.NETWORK_FLAGS.items()},
    **{f"network-{zone}": words for zone, words in ZONES.items() if zone != "green"},
}


def render_sarif(results: Sequence[AuditResult], *, top: int | None = None, **_page: object) -> str:
    """`results` as one SARIF run; what is flagged is an `error`, what else was found has no level.

    Where a result is: the checkpoint as an artifact, the layer as a logical location. Its fingerprint names layer and
    verdict, so that the same fault of the next checkpoint is the same alert. Raises UsageError where `top` is below 1.
    """
    shown, _ = shown_layers(results, top)
    driver = {
        "name": "peel",
        "version": __version__,
        "rules": [
            {
                "id": rule,
                "name": rule.title().replace("-", ""),
                "shortDescription": {"text": rule.replace("-", " ")},
                "fullDescription": {"text": words},
                "help": {"text": words},
                "defaultConfiguration": {"level": "error"},
            }
            for rule, words in RULES.items()
        ],
    }
    found = [entry for result in results for entry in _of_run(result, shown)]
    notes = [note for result in results for note in _notifications(result)]
    run = {
        "tool": {"driver": driver},
        "invocations": [
            {"executionSuccessful": True, **({"toolExecutionNotifications": notes} if notes else {})}
        ],
        "columnKind": "unicodeCodePoints",
        "results": found,
    }
    return (
        json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, allow_nan=False) + "\n"
    )


def _notifications(result: AuditResult) -> Iterable[dict[str, Any]]:
    """What was found in the files and no verdict carries: no result, for it says nothing of a layer."""
    for found in wording.notes_on_files(result):
        yield {
            "descriptor": {"id": printable(found.kind)},
            "level": "warning",
            "message": {"text": _message(f"{base_name(result.run.checkpoint)}: {wording.finding(found)}")},
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": _uri(result.run.checkpoint)}}}],
        }


def _of_run(result: AuditResult, shown: frozenset[int]) -> Iterable[dict[str, Any]]:
    for flag in wording.network_flags(result) if result.network_flagged else ():
        said = " ".join(wording.network_lines(result)) or wording.headline(result)
        yield _result(
            result, f"network-{flag}", True, f"Network: {said}", "network", {"ce": result.network.ce}
        )
    for verdict in result.layers:
        if verdict.layer in shown and (verdict.verdict != "effective" or verdict.layer in result.flagged):
            flagged = verdict.layer in result.flagged
            outcome, said = changes.outcome(result, verdict), " ".join(changes.words(result, verdict))
            text = f"Layer {verdict.layer}: {outcome}. {said}"
            rule, place = f"layer-{outcome}", f"layer {verdict.layer}"
            yield _result(result, rule, flagged, text, place, _figures(verdict))


def _result(
    result: AuditResult, rule: str, flagged: bool, text: str, place: str, figures: dict[str, Any]
) -> dict[str, Any]:
    run = result.run
    logical = {"name": place, "fullyQualifiedName": printable(f"{base_name(run.checkpoint)}/{place}")}
    where = {
        # A checkpoint has no lines, but code scanning shows no result without one.
        "physicalLocation": {"artifactLocation": {"uri": _uri(run.checkpoint)}, "region": {"startLine": 1}},
        "logicalLocations": [{**logical, "kind": "module"}],
    }
    kind = "fail" if flagged else "open" if rule == "layer-undecided" else "informational"
    known = {"ruleIndex": list(RULES).index(rule)} if rule in RULES else {}
    return {
        "ruleId": printable(rule),
        **known,
        "kind": kind,
        "level": "error" if flagged else "none",  # as the standard asks of every kind but fail
        "message": {"text": _message(text)},
        "locations": [where],
        "partialFingerprints": {"peelLayer/v1": printable(f"{place} {rule}")},
        "properties": {"checkpoint_id": printable(run.checkpoint_id), "step": run.step, **figures},
    }


def _figures(verdict: LayerVerdict) -> dict[str, Any]:
    low, high = verdict.gap_interval or (None, None)
    figures = {
        "gap": verdict.gap,
        "gap_low": low,
        "gap_high": high,
        "effective_bits": verdict.effective_bits,
        "fvu": verdict.fvu,
        "drop_cost": verdict.drop_cost,
        "score": verdict.score,
    }
    return {
        "layer": verdict.layer,
        "sublayer": verdict.sublayer,
        "reference": printable(verdict.reference.key) if verdict.reference else None,
        **{name: _finite(value) for name, value in figures.items()},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _message(text: str) -> str:
    """`text` without what a SARIF viewer would take for a placeholder or make a link of."""
    return printable(text).replace("{", "{{").replace("}", "}}").replace("](", "] (")


def _uri(checkpoint: str) -> str:
    """The checkpoint as a URI reference: absolute where its path is."""
    path = quote(checkpoint, safe="/", errors="surrogatepass")
    return f"file://{path}" if path.startswith("/") else path or "."
