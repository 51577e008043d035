"""What the HTML page draws and shows: the results as plain figures and words, packed small."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from peelcli.records import AuditResult, LayerVerdict
from peelcli.records.printable import printable
from peelcli.report import changes, wording
from peelcli.report.plain import base_name, fixed, short, signed
from peelcli.report.ranking import shown_layers
from peelcli.report.zones import map_text

LARGEST = 1_080_000  # characters of packed data: the page keeps below 6 MB with its plotting library
MOST_POINTS = 4000  # of maps in the cloud; more are slow to draw and hide each other

# Header, class of its cells ("n" for figures) and cell of each column of the layer table.
COLUMNS: tuple[tuple[str, str, Callable[[LayerVerdict], str]], ...] = (
    ("layer", "n", lambda v: str(v.layer)),
    ("verdict", "", lambda v: v.verdict),
    ("gap", "n", lambda v: signed(v.gap)),
    ("low", "n", lambda v: signed(v.gap_interval[0]) if v.gap_interval else "-"),
    ("high", "n", lambda v: signed(v.gap_interval[1]) if v.gap_interval else "-"),
    ("decided by", "", lambda v: printable(wording.reference(v.reference))),
    ("bits", "n", lambda v: short(v.effective_bits)),
    ("own", "n", lambda v: short(v.own_bits)),
    ("fvu", "n", lambda v: fixed(v.fvu)),
    ("drop", "n", lambda v: signed(v.drop_cost)),
    ("blame", "", lambda v: wording.sublayer(v.sublayer)),
    ("score", "n", lambda v: signed(v.score)),
)
TRIED = ("reference", "gap", "KL", "fvu", "steps", "seconds", "fit")


def cells(verdict: LayerVerdict) -> list[str]:
    """The row of a layer, as text."""
    return [read(verdict) for _, _, read in COLUMNS]


def packed(results: Sequence[AuditResult], top: int | None = None) -> str:
    """`results` as gzipped JSON in base64, so that nothing in a name can end the element that holds it.

    Where that is above `LARGEST`, the words about effective layers of all but the newest run are left out.
    """
    for brief in (False, True):
        text = json.dumps(page_data(results, top, brief=brief), allow_nan=False, separators=(",", ":"))
        found = base64.b64encode(gzip.compress(text.encode("ascii"), 9, mtime=0)).decode("ascii")
        if len(found) <= LARGEST:
            break
    return found


def page_data(
    results: Sequence[AuditResult], top: int | None = None, *, brief: bool = False
) -> dict[str, Any]:
    """The tables and words of all runs, and what was tried on the newest. Raises UsageError where `top` is below 1."""
    shown, _ = shown_layers(results, top)
    texts: dict[str, int] = {}
    each = max(MOST_POINTS // len(results), 1)
    newest = results[-1]
    return {
        "columns": [[name, kind] for name, kind, _ in COLUMNS],
        "layers": sorted(shown),
        "runs": [
            _run(result, number, shown, texts, each, brief=brief and result is not newest)
            for number, result in enumerate(results, start=1)
        ],
        "texts": list(texts),
        "tried_columns": TRIED,
        "tried": {str(layer): tried(newest, layer) for layer in sorted(shown)},
    }


def _run(
    result: AuditResult,
    number: int,
    shown: frozenset[int],
    texts: dict[str, int],
    most_maps: int,
    *,
    brief: bool,
) -> dict[str, Any]:
    run, network, bounds = result.run, result.network, result.network.bounds
    layers = [verdict for verdict in result.layers if verdict.layer in shown]
    rows = [cells(verdict) for verdict in layers]
    last = bounds.last.ce if bounds and bounds.last else None
    return {
        "name": name(result, number),
        "label": str(run.step) if run.step is not None else f"#{number}",
        "step": run.step,
        "ce": _figure(network.ce),
        "control": _figure(bounds.control) if bounds else None,
        "last": _figure(last),
        "yes": _figure(bounds.yes.ce) if bounds else None,
        "least": _figure(bounds.running_minimum) if bounds else None,
        "zone": network.zone,
        "maps": _maps(result, most_maps),
        "bad": bool(result.flagged or result.network_flagged),
        "headline": printable(wording.headline(result)),
        "about": [[title, printable(sentence)] for title, sentence in wording.header(result)],
        "said": [printable(sentence) for sentence in said(result)],
        "flagged": [layer for layer in result.flagged if layer in shown],
        "cells": [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in COLUMNS],
        "why": [None if brief and v.verdict == "effective" else _text(result, v, texts) for v in layers],
    }


def name(result: AuditResult, number: int) -> str:
    """A run's name in the page: its place in the series, its checkpoint, and its step where it is known."""
    step = "" if result.run.step is None else f", step {result.run.step}"
    return f"#{number} {printable(base_name(result.run.checkpoint))}{step}"


def said(result: AuditResult) -> list[str]:
    """Notes on the network, findings of the scan and what was not audited, in sentences."""
    findings = [f"Scan of the files: {wording.finding(found)}" for found in result.run.findings]
    return [*wording.network_lines(result), *findings, *(f"Not audited: {s}" for s in result.run.skipped)]


def tried(result: AuditResult, layer: int) -> list[list[str]]:
    """Every reference that was measured on `layer`, the best first: the cells of a row each."""
    scores = result.run.tried_on(layer)
    gaps = {score.reference: result.gap_of(score.reference) for score in scores}
    return [
        [
            printable(wording.reference(s.reference)),
            signed(gaps[s.reference]),
            fixed(_mean(s.kl_eval), 4),
            fixed(s.fit.fvu_eval),
            str(s.fit.steps),
            fixed(s.fit.seconds, 1),
            printable(s.fit.reason if s.fit.converged else f"not converged: {s.fit.reason}"),
        ]
        for s in sorted(
            scores, key=lambda s: -gaps[s.reference] if math.isfinite(gaps[s.reference]) else math.inf
        )
    ]


def _text(result: AuditResult, verdict: LayerVerdict, texts: dict[str, int]) -> int:
    return texts.setdefault("\n".join(map(printable, changes.words(result, verdict))), len(texts))


def _maps(result: AuditResult, most: int) -> list[list[Any]]:
    """Map, loss and convergence of the peeled paths; of more than `most` the best, and others evenly by rank."""
    if result.run.paths is None:
        return []
    found = [(_figure(_mean(s.nll_eval)), s) for s in result.run.paths.scores]
    ranked = sorted(((ce, s) for ce, s in found if ce is not None), key=lambda pair: pair[0])
    kept = [ranked[index * len(ranked) // most] for index in range(most)] if len(ranked) > most else ranked
    return [[map_text(s.target_map), ce, all(fit.converged for fit in s.fits)] for ce, s in kept]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _figure(value: float | None) -> float | None:
    """Five digits are more than a chart shows."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
