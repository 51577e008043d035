"""Peeling the paths of a checkpoint: the fit of its blocks that `paths.peel` takes, and the stage that runs it."""

from peelcli.fitting.paths.block_fit import BlockFit, PeelTask
from peelcli.fitting.paths.peel import Asked, asked_maps, peel_steps

__all__ = ["Asked", "BlockFit", "PeelTask", "asked_maps", "peel_steps"]
