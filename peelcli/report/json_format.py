"""The report for scripts: JSON whose keys are added to, never renamed; documented by `schema.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import numpy as np

from peelcli.records import (
    AuditResult,
    Bound,
    Bounds,
    Comparison,
    Finding,
    HistoryEntry,
    LayerVerdict,
    Paths,
    PathScore,
    Reference,
    Score,
)
from peelcli.records.printable import harmless_json
from peelcli.report.few_bits import few_bits_json
from peelcli.report.ranking import shown_layers
from peelcli.report.sentences import network_notes

SCHEMA, SCHEMA_VERSION = "peel/report", 1


def render_json(
    results: Sequence[AuditResult],
    *,
    top: int | None = None,
    history: Sequence[HistoryEntry] = (),
    **_page: object,
) -> str:
    """`results` as one JSON object, ending with a newline; runs that agree differ in `timing` only.

    `top` leaves out layers as in the table, and lists them under `layers_left_out`. Without results it is the newest of
    the `history` that says whether anything is flagged. What is not finite becomes null. Raises UsageError where `top`
    is below 1, and TypeError where a run's config holds what JSON cannot.
    """
    shown, _ = shown_layers(results, top)
    report = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "flagged": any(result.flagged or result.network_flagged for result in results)
        or (not results and history[-1].flagged),
        "runs": [_run(result, shown) for result in results],
        "history": [asdict(entry) for entry in history],
    }
    return harmless_json(json.dumps(plain_object(report, "report"), indent=2, allow_nan=False)) + "\n"


def report_schema() -> dict[str, Any]:
    """The published JSON Schema (draft 2020-12) of what `render_json` returns."""
    schema: dict[str, Any] = json.loads(
        files("peelcli.report").joinpath("schema.json").read_text(encoding="utf-8")
    )
    return schema


def _run(result: AuditResult, shown: frozenset[int]) -> dict[str, Any]:
    run = result.run
    return {
        "checkpoint": run.checkpoint,
        "checkpoint_id": run.checkpoint_id,
        "step": run.step,
        "family": run.family,
        "num_layers": run.num_layers,
        "audited_layers": run.layers,
        "dtype": run.dtype,
        "device": run.device,
        "scheme": run.scheme,
        "granularity": run.granularity,
        "symmetric": run.symmetric,
        "group_size": run.group_size,
        "seed": run.seed,
        "data": run.data,
        "data_hash": run.data_hash,
        "tokens": run.tokens,
        "seq_len": run.seq_len,
        "vocab_size": run.vocab_size,
        "flagged": bool(result.flagged or result.network_flagged),
        "flagged_layers": result.flagged,
        "network": _network(result),
        "layers": [layer_object(verdict, result) for verdict in result.layers if verdict.layer in shown],
        "comparison": None if result.comparison is None else _comparison(result.comparison, shown),
        "unmoved_layers": result.unmoved,
        "layers_left_out": [verdict.layer for verdict in result.layers if verdict.layer not in shown],
        "references": [score_object(score, run.nll_eval) for score in run.scores],
        "quantized": few_bits_json(run.quantized),
        "paths": None if run.paths is None else _paths(run.paths, run.nll_eval),
        "findings": [_finding(found) for found in run.findings],
        "skipped": run.skipped,
        "config": run.config,
        "timing": {
            "seconds": run.seconds,
            "fits": {score.reference.key: score.fit.seconds for score in run.scores},
            "paths": None if run.paths is None else run.paths.seconds,
        },
    }


def _network(result: AuditResult) -> dict[str, Any]:
    network = result.network
    return {
        "ce": network.ce,
        "perplexity": network.perplexity,
        "zone": network.zone,
        "bounds": None if network.bounds is None else _bounds(network.bounds),
        "flags": network.flags,
        "notes": network_notes(network),
        "flagged": result.network_flagged,
        "entropy": network.entropy,
        "unigram_ce": result.run.unigram_ce,
        "data_fit": network.data_fit,
    }


def _comparison(comparison: Comparison, shown: frozenset[int]) -> dict[str, Any]:
    return {
        "checkpoint": comparison.checkpoint,
        "checkpoint_id": comparison.checkpoint_id,
        "step": comparison.step,
        "is_baseline": comparison.is_baseline,
        "regressed_layers": comparison.regressed,
        "new_flags": comparison.new_flags,
        "ce_change": comparison.ce_change,
        "ce_change_interval": comparison.ce_change_interval,
        "notes": comparison.notes,
        "layers": [
            {
                "layer": change.layer,
                "status": change.status,
                "before": change.before,
                "after": change.after,
                "gap_change": change.gap_change,
                "gap_change_interval": change.gap_change_interval,
                "reference": None if change.reference is None else _reference(change.reference),
                "reason": change.reason,
            }
            for change in comparison.layers
            if change.layer in shown or change.after is None
        ],
    }


def _bounds(bounds: Bounds) -> dict[str, Any]:
    return {
        "control": bounds.control,
        "head_gap": bounds.head_gap,
        "head_gap_interval": bounds.head_interval,
        "head_allowance": bounds.head_allowance,
        "yes": _bound(bounds.yes),
        "last": None if bounds.last is None else _bound(bounds.last),
        "running_minimum": bounds.running_minimum,
        "maps_beaten": bounds.beaten,
        "maps_peeled": bounds.peeled,
        "threshold": bounds.threshold,
    }


def _bound(bound: Bound) -> dict[str, Any]:
    return {
        "map": bound.target_map,
        "ce": bound.ce,
        "gap": bound.gap,
        "gap_interval": bound.gap_interval,
    }


def _paths(paths: Paths, nll_eval: Sequence[float]) -> dict[str, Any]:
    return {
        "schemes": paths.schemes,
        "num_fits": paths.num_fits,
        "left_out": paths.left_out,
        "control": _path(paths.control, nll_eval),
        "maps": [_path(score, nll_eval) for score in paths.scores],
    }


def _path(score: PathScore, nll_eval: Sequence[float]) -> dict[str, Any]:
    trained, reached = _mean(nll_eval), _mean(score.nll_eval)
    return {
        "map": score.target_map,
        "ce": reached,
        "ce_select": _mean(score.nll_select),
        "gap": None if trained is None or reached is None else trained - reached,
        "unexplained": score.unexplained,
        "converged": all(fit.converged for fit in score.fits),
        "head": score.fits[-1].reason,
    }


def layer_object(verdict: LayerVerdict, result: AuditResult) -> dict[str, Any]:
    """What is said about one layer, as the schema's `layer`."""
    return {
        "layer": verdict.layer,
        "verdict": verdict.verdict,
        "flagged": verdict.layer in result.flagged,
        "sublayer": verdict.sublayer,
        "score": verdict.score,
        "gap": verdict.gap,
        "gap_interval": verdict.gap_interval,
        "reference": None if verdict.reference is None else _reference(verdict.reference),
        "effective_bits": verdict.effective_bits,
        "own_bits": verdict.own_bits,
        "fvu": verdict.fvu,
        "drop_cost": verdict.drop_cost,
        "reason": verdict.reason,
        "advice": verdict.advice,
        "notes": verdict.notes,
    }


def _reference(reference: Reference) -> dict[str, Any]:
    return {
        "kind": reference.kind,
        "layer": reference.layer,
        "target": reference.target,
        "sublayer": reference.sublayer,
        "scheme": reference.scheme,
        "group_size": reference.group_size,
        "bits": reference.bits,
        "origin_id": reference.origin_id,
        "origin_step": reference.origin_step,
        "key": reference.key,
    }


def score_object(score: Score, nll_eval: Sequence[float]) -> dict[str, Any]:
    """A reference and what was measured with it, as the schema's `measured_reference`."""
    trained, replaced = _mean(score.beside(nll_eval)), _mean(score.nll_eval)
    return {
        **_reference(score.reference),
        "gap": None if trained is None or replaced is None else trained - replaced,
        "sequences": len(score.nll_eval),
        "kl": _mean(score.kl_eval),
        "fvu": score.fit.fvu_eval,
        "fvu_fit": score.fit.fvu_fit,
        "start": score.fit.start,
        "steps": score.fit.steps,
        "converged": score.fit.converged,
        "reason": score.fit.reason,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _finding(found: Finding) -> dict[str, Any]:
    return {"kind": found.kind, "layer": found.layer, "tensor": found.tensor, "message": found.message}


def plain_object(value: object, where: str) -> Any:
    """`value` in the types of JSON, for a file that any parser reads: no NaN, no infinity."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_object(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_object(item, f"{where}[{position}]") for position, item in enumerate(value)]
    raise TypeError(
        f"{where} is a {type(value).__name__}: expected a string, number, bool, null, list or mapping"
    )
