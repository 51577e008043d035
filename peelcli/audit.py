"""The audit: open, scan, extract, fit. Generators of progress and, last, of their result; they print nothing.

Each step is skipped where its file is there already under the key of the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from peelcli.calibration import Calibration, build_calibration
from peelcli.calibration.files import holds_text
from peelcli.checkpoint import other_files
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.structure import layers_of
from peelcli.checkpoint.tokenizer import load_tokenizer, special_ids
from peelcli.checkpoint.training_step import training_step
from peelcli.config import (
    DeviceConfig,
    ExtractConfig,
    FitConfig,
    MachineConfig,
    TrainedSchemeConfig,
    parse_layers,
)
from peelcli.config.schemes import check_scheme
from peelcli.describe import describe
from peelcli.earlier import earlier_of, open_earlier, why_not_rolled_back
from peelcli.errors import ArtefactError, CheckpointError
from peelcli.fit import FitTask, Fitter
from peelcli.keys import extraction_key, fit_key, relevant
from peelcli.opened import Opened, open_and_scan
from peelcli.precision import from_settings, to_settings
from peelcli.quant.kernels import choice
from peelcli.records import Finding, Run, run_from
from peelcli.records.progress import Progress
from peelcli.references.plan import default_scheme
from peelcli.runtime.batch_sizes import block_batch
from peelcli.runtime.locks import held
from peelcli.runtime.machine import cpu_quota
from peelcli.scoring.trained_pass import Extraction, NonFiniteStatesError, extract, stored_states
from peelcli.storage.activations import ActivationFile
from peelcli.storage.fit_reader import key_of, read_fit
from peelcli.tracking.same_tokens import Tokens, require_same_tokens, tokens_of
from peelcli.workspace import Workspace, require_outside


def num_threads(settings: DeviceConfig) -> int:
    """Threads asked for; auto: the quota, and never more than torch has of itself, which OMP_NUM_THREADS sets."""
    return settings.threads or min(cpu_quota(), torch.get_num_threads())


def open_model(opened: Opened, settings: DeviceConfig, workspace: Workspace) -> BlockwiseModel:
    """Build the model on the device and in the precision asked for, and set torch's threads."""
    torch.set_num_threads(num_threads(settings))
    choice.use(settings.kernels)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = settings.dtype
    if dtype == "auto":
        half = device.startswith("cuda") and opened.stored_bits <= 16
        dtype = "bfloat16" if half else "float32"
    return BlockwiseModel(
        opened.path,
        dtype=getattr(torch, dtype),
        device=device,
        offload_dir=workspace.offload,
        running=opened.precision.running,
        stamp=opened.stamp,
    )


def calibrate(opened: Opened, model: BlockwiseModel, settings: ExtractConfig) -> Calibration:
    """The token ids of the run, through the checkpoint's own tokenizer."""
    tokenizer = load_tokenizer(opened.path) if not settings.data or holds_text(settings.data) else None
    budget = {"fit": settings.fit_tokens, "select": settings.select_tokens, "eval": settings.eval_tokens}
    return build_calibration(
        settings.data,
        tokenizer,
        model.vocab_size,
        model.max_positions,
        settings.seq_len,
        budget,
        settings.seed,
        special_ids(opened.files),
    )


def extract_steps(
    opened: Opened,
    settings: ExtractConfig,
    workspace: Workspace,
    output: Path | None = None,
    first: Tokens | None = None,
) -> Generator[Progress, None, Path]:
    """Make sure of the file of trained states; returns its path.

    first: the tokens of the series that the checkpoint is to be compared with. UsageError where its own differ, before
    anything is run.
    """
    key = extraction_key(opened, settings)
    path = output or workspace.activations(key)
    require_outside(path, opened.path)

    def is_done() -> bool:
        return _is_done(path, key, settings, _key_of, named=output is not None)

    if not is_done():
        with (yield from held(path, wait=settings.wait)):
            if not is_done():  # else another process has done it meanwhile
                yield from _extract(opened, settings, workspace, path, first)
                return path
    if first is not None:
        require_same_tokens(first, tokens_of(run_from(_about(path))))
    return path


def _extract(
    opened: Opened, settings: ExtractConfig, workspace: Workspace, path: Path, first: Tokens | None
) -> Generator[Progress, None, None]:
    if not opened.is_finite:
        finding = next(f for f in opened.scan.findings if f.kind == "non-finite")
        raise CheckpointError(
            f"{finding.message} Nothing can be extracted; `peel audit` reports the layer as broken."
        )
    yield Progress("open", 0, 2, "model")
    model = open_model(opened, settings, workspace)
    layers = parse_layers(settings.layers, model.num_layers)
    yield Progress("open", 1, 2, "calibration tokens")
    with opened.stamp.watched():
        calibration = calibrate(opened, model, settings)
        opened.stamp.require_unchanged()
    if first is not None:
        require_same_tokens(first, _tokens(opened, calibration, settings))
    about = describe(
        opened.path,
        model,
        calibration,
        scan=opened.scan,
        layers=layers,
        stored_bits=opened.stored_bits,
        seed=settings.seed,
        precision=opened.precision,
    )
    task = Extraction(
        output=path,
        about={**about, "key": extraction_key(opened, settings)},
        config={"extract": relevant(settings), "trained_scheme": to_settings(opened.trained)},
        stored=stored_states(model.num_layers, layers),
        store_dtype=about["dtype"] if settings.store_dtype == "auto" else settings.store_dtype,
        batch_size=settings.batch_size or block_batch(calibration.seq_len, model.device),
        resume=settings.resume and not settings.overwrite,
    )
    yield from extract(model, calibration, task)


def _is_done(
    path: Path, key: str, settings: MachineConfig, key_of: Callable[[Path], str | None], *, named: bool
) -> bool:
    """Whether `path` holds the work of `key`; other work under a name that the user gave is not written over.

    What lies in the work directory and cannot be read is done again.
    """
    if not path.exists() or settings.overwrite:
        return False
    try:
        if settings.resume and key_of(path) == key:
            return True
    except ArtefactError:
        if named:
            raise
    if named:
        raise ArtefactError(f"{path}: exists and holds other work. Pass --overwrite, or another --output.")
    return False


def _about(path: Path) -> dict[str, Any]:
    acts = ActivationFile(path)
    acts.close()
    return acts.about


def _key_of(path: Path) -> str:
    return str(_about(path).get("key"))


def _tokens(opened: Opened, calibration: Calibration, settings: ExtractConfig) -> Tokens:
    return Tokens(
        checkpoint=str(opened.path),
        data_hash=calibration.content_hash,
        data=calibration.description,
        tokens=calibration.tokens,
        seq_len=calibration.seq_len,
        seed=settings.seed,
        vocab_size=calibration.vocab_size,
    )


def fit_steps(
    opened: Opened,
    activations: Path,
    settings: FitConfig,
    workspace: Workspace,
    output: Path | None = None,
    earlier: Sequence[Path] = (),
    locked: Path | None = None,
) -> Generator[Progress, None, Path]:
    """Make sure of the file of fitted references; returns its path.

    earlier: checkpoints of the same run, oldest first, whose blocks are tried where `rollback` is asked for. Raises
    CheckpointError where they do not fit. locked: a file whose lock the caller holds already.
    """
    acts = ActivationFile(activations)
    try:
        if acts.about["checkpoint_id"] != opened.scan.checkpoint_id:
            raise ArtefactError(
                f"{activations}: was extracted from checkpoint {acts.about['checkpoint_id']}, and {opened.path} is "
                f"{opened.scan.checkpoint_id}: its weights have changed since. Extract again."
            )
        others = yield from open_earlier(opened, earlier, settings, workspace)
        for other in others:
            if reason := why_not_rolled_back(opened, other):
                raise CheckpointError(
                    f"{reason}: its blocks cannot stand in. Name earlier checkpoints of the same run, or leave "
                    "rollback out of --references."
                )
        key = fit_key(str(acts.about.get("key")), settings, [o.scan.checkpoint_id for o in others])
        path = output or workspace.fit(key)
        require_outside(path, opened.path)
        if _is_done(path, key, settings, key_of, named=output is not None):
            return path
        with nullcontext() if path == locked else (yield from held(path, wait=settings.wait)):
            if _is_done(path, key, settings, key_of, named=output is not None):
                return path  # another process has done it meanwhile
            yield Progress("open", 0, 1, "model")
            run_in = replace(settings, device=_device(acts, settings), dtype=_dtype(acts, settings))
            model = open_model(opened, run_in, workspace)
            _require_fitting_states(activations, acts, model)
            config = {**acts.config, "fit": relevant(settings), "key": key}
            task = FitTask(
                path,
                settings,
                config,
                resume=settings.resume and not settings.overwrite,
                earlier=tuple(earlier_of(other, workspace) for other in others),
            )
            yield from Fitter(model, acts, task).run()
        return path
    finally:
        acts.close()


def _require_shape(path: Path | str, model: BlockwiseModel, num_layers: int, vocab_size: int) -> None:
    """ArtefactError where a file is of a network of another shape than the checkpoint that it names."""
    if (num_layers, vocab_size) != (model.num_layers, model.vocab_size):
        raise ArtefactError(
            f"{path}: is of {num_layers} layers and {vocab_size} tokens, and the checkpoint that it names has "
            f"{model.num_layers} layers and {model.vocab_size} tokens: the file was changed. Make it anew."
        )


def _require_fitting_states(path: Path, acts: ActivationFile, model: BlockwiseModel) -> None:
    """Raise ArtefactError unless the stored states have the shape of the model's own."""
    _require_shape(path, model, acts.about["num_layers"], acts.about["vocab_size"])
    width = model.prepare(acts.ids[:1]).hidden.shape[-1]
    if width != acts.d_model:
        raise ArtefactError(
            f"{path}: holds states of {acts.d_model} features, and those of the checkpoint have {width}: "
            "the file was changed. Extract again."
        )


def _device(acts: ActivationFile, settings: FitConfig) -> str:
    """The device asked for; auto takes the one that the states were extracted on, where it is there."""
    if settings.device != "auto":
        return settings.device
    return "cpu" if acts.about["device"] == "cpu" else "auto"


def _dtype(acts: ActivationFile, settings: FitConfig) -> str:
    return str(acts.about["dtype"]) if settings.dtype == "auto" else settings.dtype


@dataclass(frozen=True)
class AuditPaths:
    """What an audit leaves: the run it measured, and its files (None where nothing could be measured)."""

    run: Run
    activations: Path | None
    fit: Path | None


def audit_steps(
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
    opened: Opened,
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
            activations = yield from extract_steps(opened, extract_settings, workspace, first=first)
        except NonFiniteStatesError as error:
            finding = Finding("non-finite", str(error), layer=error.layer or None)
            return AuditPaths(_unmeasured(opened, extract_settings, fit_settings, (finding,)), None, None)
        try:
            yield from fit_steps(opened, activations, fit_settings, workspace, earlier=earlier, locked=fitted)
            return AuditPaths(_with_other_files(read_fit(fitted), opened), activations, fitted)
        except ArtefactError:
            if activations.exists():
                raise  # else another audit of the same states has discarded them: extract them again


def _found(fitted: Path, opened: Opened, settings: FitConfig) -> Run | None:
    """The run of a finished fit; None where there is none that can be read."""
    if not fitted.exists() or settings.overwrite or not settings.resume:
        return None
    try:
        return _with_other_files(read_fit(fitted), opened)
    except ArtefactError:
        return None


def _with_other_files(run: Run, opened: Opened) -> Run:
    """The run of a fit, with what lies beside its checkpoint now instead of what lay there then."""
    now = [finding for finding in opened.scan.findings if finding.kind in other_files.KINDS]
    then = [finding for finding in run.findings if finding.kind not in other_files.KINDS]
    return replace(run, findings=(*then, *now))


def open_fitted(
    path: Path, run: Run, machine: DeviceConfig, workspace: Workspace
) -> Generator[Progress, None, tuple[Opened, BlockwiseModel]]:
    """The checkpoint that a fit belongs to, on the device and in the precision of the fit unless asked otherwise."""
    kept = run.config.get("trained_scheme")
    trained = from_settings(kept if isinstance(kept, dict) else None, run.checkpoint)
    opened = yield from open_and_scan(path, workspace, trained)
    if opened.scan.checkpoint_id != run.checkpoint_id:
        raise ArtefactError(
            f"{path}: is checkpoint {opened.scan.checkpoint_id}, and the fit belongs to {run.checkpoint_id} "
            f"({run.checkpoint}). Name the checkpoint that was audited."
        )
    settings = replace(machine, dtype=run.dtype if machine.dtype == "auto" else machine.dtype)
    model = open_model(opened, settings, workspace)
    _require_shape(f"the fit of {run.checkpoint}", model, run.num_layers, run.vocab_size)
    return opened, model


def _unmeasured(
    opened: Opened, extract_settings: ExtractConfig, fit_settings: FitConfig, findings: Sequence[Finding]
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
