"""The second stage: make sure of the file of fitted references."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.config import FitConfig
from peelcli.errors import ArtefactError, CheckpointError
from peelcli.records.progress import Progress
from peelcli.runtime.locks import held
from peelcli.stages.fitter import FitTask, Fitter
from peelcli.stages.inspection import Inspection
from peelcli.stages.keys import fit_key, is_finished, relevant
from peelcli.stages.open_model import open_model, require_shape
from peelcli.stages.previous_checkpoints import earlier_of, open_earlier, why_not_rolled_back
from peelcli.stages.workspace import Workspace, require_outside
from peelcli.storage.activations import ActivationFile
from peelcli.storage.fit_reader import key_of


def run_fit(
    opened: Inspection,
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
        if is_finished(path, key, settings, key_of, named=output is not None):
            return path
        with nullcontext() if path == locked else (yield from held(path, wait=settings.wait)):
            if is_finished(path, key, settings, key_of, named=output is not None):
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


def _require_fitting_states(path: Path, acts: ActivationFile, model: BlockwiseModel) -> None:
    """Raise ArtefactError unless the stored states have the shape of the model's own."""
    require_shape(path, model, acts.about["num_layers"], acts.about["vocab_size"])
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
