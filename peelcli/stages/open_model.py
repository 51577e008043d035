"""The model of a checkpoint, on the device and in the precision asked for."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.config import DeviceConfig
from peelcli.errors import ArtefactError
from peelcli.quant.kernels import choice
from peelcli.records import Run
from peelcli.records.progress import Progress
from peelcli.runtime.machine import cpu_quota
from peelcli.stages.inspection import Inspection, open_and_scan
from peelcli.stages.precision import from_settings
from peelcli.stages.workspace import Workspace


def num_threads(settings: DeviceConfig) -> int:
    """Threads asked for; auto: the quota, and never more than torch has of itself, which OMP_NUM_THREADS sets."""
    return settings.threads or min(cpu_quota(), torch.get_num_threads())


def open_model(opened: Inspection, settings: DeviceConfig, workspace: Workspace) -> BlockwiseModel:
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


def require_shape(path: Path | str, model: BlockwiseModel, num_layers: int, vocab_size: int) -> None:
    """ArtefactError where a file is of a network of another shape than the checkpoint that it names."""
    if (num_layers, vocab_size) != (model.num_layers, model.vocab_size):
        raise ArtefactError(
            f"{path}: is of {num_layers} layers and {vocab_size} tokens, and the checkpoint that it names has "
            f"{model.num_layers} layers and {model.vocab_size} tokens: the file was changed. Make it anew."
        )


def open_fitted(
    path: Path, run: Run, machine: DeviceConfig, workspace: Workspace
) -> Generator[Progress, None, tuple[Inspection, BlockwiseModel]]:
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
    require_shape(f"the fit of {run.checkpoint}", model, run.num_layers, run.vocab_size)
    return opened, model
