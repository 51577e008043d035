"""Baselines: an audit stored so that a later audit can be compared with it sequence by sequence.

One JSON object: the run with the per-sequence losses of the network and of every reference that may decide on a layer,
and the verdicts. It is written where the user asks for it, and nowhere else, so that a change for the worse cannot
become the measure of the next.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from peelcli import __version__
from peelcli.errors import ArtefactError, ResourceError, UsageError
from peelcli.records import AuditResult
from peelcli.records.check_run import UNBOUNDED, check_result
from peelcli.records.from_json import from_json
from peelcli.runtime import durable
from peelcli.runtime.small_files import parse_json, read_bounded

SCHEMA, SCHEMA_VERSION = "peel/baseline", 1
DIGITS = 7  # decimals of a loss: a hundredth of what anything is decided by

_LARGEST = 2**27  # bytes: the losses of some thousand references on a thousand sequences


def write_baseline(path: Path, result: AuditResult) -> None:
    """Write `result` as the baseline `path`, replacing an existing one.

    Raises UsageError where nothing was measured that another audit could be held against, and ResourceError where the
    file cannot be written.
    """
    run = result.run
    if not run.data_hash or not run.nll_eval or not np.isfinite(run.nll_eval).all():
        raise UsageError(
            f"--write-baseline {path}: nothing was measured on {run.checkpoint} that a later audit could be compared "
            "with. Write the baseline from a checkpoint whose weights and losses are finite."
        )
    text = json.dumps(
        {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "peel_version": __version__,
            "audit": asdict(_kept(result)),
        },
        allow_nan=False,
        separators=(",", ":"),
    )
    try:
        durable.write_text(path, text + "\n")
    except OSError as error:
        raise ResourceError(
            f"{path}: the baseline cannot be written ({error.strerror}); name another place with --write-baseline"
        ) from error


def read_baseline(path: Path) -> AuditResult:
    """The audit in a baseline. Raises ArtefactError if the file is no baseline, damaged, or of a newer schema."""
    again = "write one with `peel report FIT --write-baseline FILE`"
    try:
        data = read_bounded(path, _LARGEST)
    except OSError as error:
        raise ArtefactError(f"{path}: the baseline cannot be read ({error.strerror}); {again}") from error
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ArtefactError(f"{path}: is no baseline, or a damaged one ({error}); {again}") from error
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise ArtefactError(f"{path}: expected a baseline, found {found!r}; {again}")
    if value.get("schema_version") != SCHEMA_VERSION:
        raise ArtefactError(
            f"{path}: has baseline version {value.get('schema_version')!r}, and this peel reads {SCHEMA_VERSION}; "
            f"use the peel that wrote it, or {again}"
        )
    try:
        result = from_json(AuditResult, value.get("audit"), unbounded=UNBOUNDED)
        check_result(result)
        return result
    except ValueError as error:
        raise ArtefactError(f"{path}: damaged ({error}); {again}") from error


def _kept(result: AuditResult) -> AuditResult:
    """The result without what comparisons do not need: findings, texts, `select` losses, other bit widths."""
    run = result.run
    scores = tuple(
        replace(score, nll_select=(), nll_eval=_rounded(score.nll_eval), kl_eval=_rounded(score.kl_eval))
        for score in run.scores
        if score.reference.scheme in (None, run.scheme)
        and np.isfinite([*score.nll_eval, *score.kl_eval]).all()
    )
    slim = replace(
        run,
        nll_eval=_rounded(run.nll_eval),
        scores=scores,
        paths=None,
        findings=(),
        skipped=(),
        nll_select=(),
        entropy_eval=(),
        seconds=0.0,
    )
    layers = tuple(replace(v, reason="", advice="", notes=()) for v in result.layers)
    network = replace(result.network, notes=())
    return replace(result, run=slim, layers=layers, network=network, comparison=None)


def _rounded(losses: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(loss, DIGITS) for loss in losses)
