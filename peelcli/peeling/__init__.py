"""Peeling the paths of a checkpoint: the fit of its blocks that `paths.peel` takes, and the stage that runs it."""

from peelcli.peeling.block_fit import BlockFit, PeelTask
from peelcli.peeling.stage import Asked, asked_maps, peel_steps

__all__ = ["Asked", "BlockFit", "PeelTask", "asked_maps", "peel_steps"]
