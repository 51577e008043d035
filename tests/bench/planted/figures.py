"""The figures of the suite: AUROC over layers, flags at the shipped thresholds, blamed sublayers, intervals.

Intervals are bootstrapped over checkpoints, for layers of one checkpoint are not independent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from results import table

from planted.cases import Base, Case, cases_of
from planted.detect import PEERS, Detected, verdicts_of
from planted.truth import Truth

DRAWS = 500
DETECTORS = ("peel", *PEERS, "fvu")
# Which way a detector points: −1 where a low number is suspicious.
ORIENTATION = {
    "peel": 1,
    "drop cost": -1,
    "gradient norm": 1,
    "alpha": 1,
    "warnings": 1,
    "GPTQ error": 1,
    "fvu": -1,
}


@dataclass(frozen=True)
class Row:
    """One checkpoint: what was planted, what it did, what was said."""

    case: Case
    truths: tuple[Truth, ...]
    said: Detected
    seconds: float

    @property
    def positives(self) -> set[int]:
        """Layers that ought to be flagged."""
        return {truth.layer for truth in self.truths if truth.is_positive}

    def layers(self) -> range:
        """All layers, from 1."""
        return range(1, len(self.said.verdicts) + 1)


def rows_of(bases: Sequence[Base], cache: Path) -> list[Row]:
    """All that was measured of the bases' cases."""
    found = []
    for case in (case for base in bases for case in cases_of(base)):
        kept = cache / "cases" / f"{case.name}.json"
        if not kept.exists():
            continue
        record = json.loads(kept.read_text(encoding="utf-8"))
        if "fit" not in record:
            continue  # not audited yet
        truths = tuple(Truth(**truth) for truth in record["truths"])
        said = verdicts_of(Path(record["fit"]), record["peers"])
        found.append(Row(case, truths, said, record["audit_seconds"]))
    return found


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a positive scores above a negative, ties by half; nan where one of them is missing."""
    if not positive or not negative:
        return float("nan")
    one, other = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float(((one > other) + 0.5 * (one == other)).mean())


def scores(
    rows: Sequence[Row], detector: str, only: Callable[[Row], bool]
) -> tuple[list[float], list[float]]:
    """Scores of the positives of the rows that `only` takes, and of all layers that are none, of every row."""
    positive, negative = [], []
    for row in rows:
        values = [-np.inf if v is None else v * ORIENTATION[detector] for v in row.said.scores[detector]]
        values = [-np.inf if np.isnan(v) else v for v in values]
        for layer, value in zip(row.layers(), values, strict=True):
            if layer not in row.positives:
                negative.append(value)
            elif only(row):
                positive.append(value)
    return positive, negative


def bootstrapped(rows: Sequence[Row], figure: Callable[[Sequence[Row]], float]) -> str:
    """A figure with its 95% interval over draws of checkpoints."""
    rng = np.random.default_rng(0)
    draws = [figure([rows[i] for i in rng.integers(len(rows), size=len(rows))]) for _ in range(DRAWS)]
    low, high = np.nanquantile(draws, [0.025, 0.975]) if not np.isnan(draws).all() else (np.nan, np.nan)
    return f"{figure(rows):.3f} ({low:.3f} to {high:.3f})"


def flagged_share(rows: Sequence[Row]) -> float:
    """Of the layers that ought to be flagged, those that are."""
    hits = [layer in row.said.flagged for row in rows for layer in row.positives]
    return float(np.mean(hits)) if hits else float("nan")


def false_share(rows: Sequence[Row]) -> float:
    """Of the layers that ought not to be flagged, those that are."""
    hits = [layer in row.said.flagged for row in rows for layer in row.layers() if layer not in row.positives]
    return float(np.mean(hits)) if hits else float("nan")


def named_share(rows: Sequence[Row]) -> float:
    """Of the flagged layers of which one sublayer was hurt, those where it is named."""
    hits = [
        row.said.sublayers[layer - 1] == row.case.part
        for row in rows
        if row.case.part != "block"
        for layer in row.positives & set(row.said.flagged)
    ]
    return float(np.mean(hits)) if hits else float("nan")


def report(bases: Sequence[Base], cache: Path) -> str:
    """Markdown, a part for each split."""
    parts = []
    for split in dict.fromkeys(base.split for base in bases):
        rows = rows_of([base for base in bases if base.split == split], cache)
        if not rows:
            raise SystemExit(f"nothing has been measured of the split {split!r}: run without --models-only")
        parts.append(f"### {split}\n\n{_split(rows)}")
    return "\n\n".join(parts)


def _split(rows: Sequence[Row]) -> str:
    kinds = sorted({row.case.group for row in rows if row.positives})
    there = [d for d in DETECTORS if all(d in row.said.scores for row in rows)]
    body = []
    for kind in ("all", *kinds):

        def only(row: Row, kind: str = kind) -> bool:
            return kind in ("all", row.case.group)

        count = sum(len(row.positives) for row in rows if only(row))
        found = sum(len(row.positives & set(row.said.flagged)) for row in rows if only(row))
        areas = [auroc(*scores(rows, detector, only)) for detector in there]
        body.append((kind, f"{found} of {count}", *(f"{area:.3f}" for area in areas)))
    healthy = sum(len(row.said.verdicts) - len(row.positives) for row in rows)
    false = [(row.case.name, n) for row in rows for n in row.said.flagged if n not in row.positives]
    missed = [(row.case.name, n) for row in rows for n in sorted(row.positives - set(row.said.flagged))]
    plants = sum(len(row.truths) for row in rows)
    sound = [row for row in rows if not row.positives]
    lines = [
        f"{len(rows)} checkpoints, {plants} hurt layers, {body[0][1].split()[-1]} of them positive (harm above 0.01 "
        f"nats, or idle); {healthy} other layers.",
        table(("fault", "flagged", *(f"AUROC {d}" for d in there)), body),
        f"- AUROC of peel over all: {bootstrapped(rows, lambda r: auroc(*scores(r, 'peel', lambda _: True)))}",
        f"- Positives flagged: {bootstrapped(rows, flagged_share)}",
        f"- False flags per other layer: {bootstrapped(rows, false_share)}: {_named(false)}",
        f"- Missed: {_named(missed)}",
        f"- Checkpoints without a positive, flagged: {sum(bool(r.said.flagged) for r in sound)} of {len(sound)}",
        f"- The hurt sublayer named where flagged: {bootstrapped(rows, named_share)}",
        f"- Processor seconds per audit: median {np.median([row.seconds for row in rows]):.1f}",
    ]
    return "\n".join([lines[0], "", lines[1], "", *lines[2:]])


def _named(found: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} layer {layer}" for name, layer in found) or "none"
