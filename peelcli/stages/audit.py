"""The audit: open, scan, extract, fit. Generators of progress and, last, of their result; they print nothing.

Each step is skipped where its file is there already under the key of the same work.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peelcli.checkpoint import other_files
from peelcli.checkpoint.structure import layers_of
from peelcli.checkpoint.training_step import training_step
from peelcli.config import (
    ExtractConfig,
    FitConfig,
    TrainedSchemeConfig,
    parse_layers,
)
from peelcli.config.schemes import check_scheme
from peelcli.errors import ArtefactError
from peelcli.records import Finding, Run
from peelcli.records.progress import Progress
from peelcli.references.plan import default_scheme
from peelcli.runtime.locks import held
from peelcli.scoring.trained_pass import NonFiniteStatesError
from peelcli.stages.extract import run_extract
from peelcli.stages.fit import run_fit
from peelcli.stages.inspection import Inspection, open_and_scan
from peelcli.stages.keys import extraction_key, fit_key, relevant
from peelcli.stages.previous_checkpoints import open_earlier, why_not_rolled_back
from peelcli.stages.workspace import Workspace
from peelcli.storage.fit_reader import read_fit
from peelcli.tracking.same_tokens import Tokens, require_same_tokens, tokens_of


@dataclass(frozen=True)
class AuditPaths:
    """What an audit leaves: the run it measured, and its files (None where nothing could be measured)."""

    run: Run
    activations: Path | None
    fit: Path | None


def run_audit(
    path: Path,
    extract_settings: ExtractConfig,
    fit_settings: FitConfig,
    workspace: Workspace,
    earlier: Sequence[Path] = (),
    first: Run | None = None,
    trained: TrainedSchemeConfig | None = None,
) -> Generator[Progress, None, AuditPaths]:
    """Scan, extract and fit one checkpoint, skipping what is done; a broken one yields its findings alone.

    earlier: checkpoints audited before it, oldest first. Those that are built alike serve for `rollback`; the run
    says of the others that they do not. first: the first measured run of the series. UsageError where the checkpoint's
    tokens are not the same. trained: how the weights were trained, where the files do not say so themselves.
    """
    s = fit_settings
    check_scheme(s.scheme, s.granularity, s.group_size, s.scale, s.symmetric)
    opened = yield from open_and_scan(path, workspace, trained)
    if not opened.is_finite:
        return AuditPaths(_unmeasured(opened, extract_settings, fit_settings, ()), None, None)
    others = yield from open_earlier(opened, earlier, fit_settings, workspace)
    reasons = [why_not_rolled_back(opened, other) for other in others]
    others = [other for other, reason in zip(others, reasons, strict=True) if reason is None]
    skipped = tuple(f"rollback references: {reason}" for reason in reasons if reason is not None)
    tokens = None if first is None else tokens_of(first)
    extraction = extraction_key(opened, extract_settings)
    ids = [other.scan.checkpoint_id for other in others]
    fitted = workspace.fit(fit_key(extraction, fit_settings, ids))
    found = _found(fitted, opened, fit_settings)
    if found is None:
        with (yield from held(fitted, wait=fit_settings.wait)):
            found = _found(fitted, opened, fit_settings)
            if found is None:
                same_run = [other.path for other in others]
                done = yield from _measure(
                    opened, extract_settings, fit_settings, workspace, fitted, same_run, tokens
                )
                return replace(done, run=replace(done.run, skipped=(*done.run.skipped, *skipped)))
    if tokens is not None:
        require_same_tokens(tokens, tokens_of(found))
    acts = workspace.activations(extraction)
    found = replace(found, skipped=(*found.skipped, *skipped))
    return AuditPaths(found, acts if acts.exists() else None, fitted)


def _measure(
    opened: Inspection,
    extract_settings: ExtractConfig,
    fit_settings: FitConfig,
    workspace: Workspace,
    fitted: Path,
    earlier: Sequence[Path],
    first: Tokens | None,
) -> Generator[Progress, None, AuditPaths]:
    """Extract and fit; the caller holds the lock of `fitted`."""
    while True:
        try:
            activations = yield from run_extract(opened, extract_settings, workspace, first=first)
        except NonFiniteStatesError as error:
            finding = Finding("non-finite", str(error), layer=error.layer or None)
            return AuditPaths(_unmeasured(opened, extract_settings, fit_settings, (finding,)), None, None)
        try:
            yield from run_fit(opened, activations, fit_settings, workspace, earlier=earlier, locked=fitted)
            return AuditPaths(_with_other_files(read_fit(fitted), opened), activations, fitted)
        except ArtefactError:
            if activations.exists():
                raise  # else another audit of the same states has discarded them: extract them again


def _found(fitted: Path, opened: Inspection, settings: FitConfig) -> Run | None:
    """The run of a finished fit; None where there is none that can be read."""
    if not fitted.exists() or settings.overwrite or not settings.resume:
        return None
    try:
        return _with_other_files(read_fit(fitted), opened)
    except ArtefactError:
        return None


def _with_other_files(run: Run, opened: Inspection) -> Run:
    """The run of a fit, with what lies beside its checkpoint now instead of what lay there then."""
    now = [finding for finding in opened.scan.findings if finding.kind in other_files.KINDS]
    then = [finding for finding in run.findings if finding.kind not in other_files.KINDS]
    return replace(run, findings=(*then, *now))


def _unmeasured(
    opened: Inspection, extract_settings: ExtractConfig, fit_settings: FitConfig, findings: Sequence[Finding]
) -> Run:
    """The run of a checkpoint that holds values that are not finite: what the scan says, and nothing measured."""
    num_layers = layers_of(opened.files.config)
    return Run(
        checkpoint=str(opened.path),
        checkpoint_id=opened.scan.checkpoint_id,
        num_layers=num_layers,
        layers=parse_layers(extract_settings.layers, num_layers),
        scheme=fit_settings.scheme or default_scheme([]),
        group_size=fit_settings.group_size,
        seed=extract_settings.seed,
        tokens={"fit": 0, "select": 0, "eval": 0},
        seq_len=0,
        data="none: nothing was measured",
        vocab_size=0,
        step=training_step(opened.path),
        layer_hashes={str(n): h for n, h in opened.scan.layer_hashes.items()},
        config={"extract": relevant(extract_settings), "fit": relevant(fit_settings)},
        findings=(*opened.scan.findings, *findings),
    )
