"""Peeling the paths of a checkpoint: the fit of its blocks that `paths.peel` takes, and the stage that runs it."""

from peelcli.fitting.paths.block_fit import BlockFit, PeelTask
from peelcli.fitting.paths.peel import WantedMaps, run_peeling, wanted_maps

__all__ = ["WantedMaps", "BlockFit", "PeelTask", "wanted_maps", "run_peeling"]
