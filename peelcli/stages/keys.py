"""What makes two pieces of work the same: the key under which their files are found again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peelcli.config import ExtractConfig, FitConfig, MachineConfig
from peelcli.errors import ArtefactError
from peelcli.stages.inspection import Inspection
from peelcli.stages.precision import to_settings
from peelcli.stages.workspace import digest, signature

# Settings that change where or how fast something is computed, never what.
_IRRELEVANT = {"output", "resume", "overwrite", "threads", "batch_size", "kernels", "wait"}


def relevant(settings: MachineConfig) -> dict[str, Any]:
    """The settings that a result depends on, as JSON values."""
    kept = {k: v for k, v in asdict(settings).items() if k not in _IRRELEVANT}
    return dict(json.loads(json.dumps(kept, default=str)))  # paths become text, tuples lists


def extraction_key(opened: Inspection, settings: ExtractConfig) -> str:
    """What makes two extractions the same work."""
    kept = relevant(settings)
    kept["data"] = signature(settings.data)
    trained = to_settings(opened.trained)
    if trained is not None:
        kept["trained_scheme"] = trained
    return digest([opened.scan.checkpoint_id, str(opened.path.resolve()), kept])


def fit_key(extraction: str, settings: FitConfig, earlier: Sequence[str] = ()) -> str:
    """What makes two fits the same work. earlier: ids of the checkpoints whose blocks stand in (`rollback`)."""
    kept = relevant(settings)
    if earlier:
        return digest([extraction, kept, list(earlier)])
    kept["references"] = [kind for kind in kept["references"] if kind != "rollback"]  # there are none
    return digest([extraction, kept])


def is_finished(
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
