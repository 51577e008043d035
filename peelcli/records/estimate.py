"""The expected cost of an audit, and the resources of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds that an audit is expected to take, and the bytes that are available."""

    checkpoint: Path
    num_layers: int
    layers: tuple[int, ...]
    tokens: int
    read_nbytes: int
    memory_nbytes: float
    free_memory: int | None
    disk_nbytes: int
    free_disk: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether memory and disk are large enough."""
        memory = self.free_memory is None or self.memory_nbytes <= self.free_memory
        return memory and self.disk_nbytes <= self.free_disk
