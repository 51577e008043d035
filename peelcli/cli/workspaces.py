"""The directories for a command's files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from peelcli.config import cache_directory

if TYPE_CHECKING:
    from peelcli.stages.workspace import Workspace


def workspace_for(checkpoint: Path, output: Path | None, *, alone: bool = True) -> Workspace:
    """The work directory of a checkpoint: `output` where it is named, else one of its own in the cache.

    `alone` is False where several checkpoints share `output`, so that each needs a directory within it.
    """
    from peelcli.stages.workspace import Workspace

    if output is not None and alone:
        return Workspace(output, checkpoint)
    return Workspace.under(output or cache_directory(os.environ), checkpoint)
