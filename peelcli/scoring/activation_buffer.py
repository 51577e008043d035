"""Where the states of a sweep's candidates lie between two layers: in scratch files, or on the accelerator itself.

Every candidate's rows have one place from its first layer on, for those that begin later come after it; a layer is gone
through in that order, `read` and then `write`.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from peelcli.runtime import durable

_PIECE_NBYTES = 2**22


class ActivationBuffer(Protocol):
    """States (n_rows, seq_len, d_model) of all candidates, as the layers move them on."""

    def turn(self, layer: int) -> contextlib.AbstractContextManager[None]:
        """For the length of the context, `read` gives the states below `layer`, and `write` takes its own."""
        ...

    def read(self, count: int) -> Tensor:
        """The next so many rows."""
        ...

    def write(self, hidden: Tensor) -> None:
        """Some more rows."""
        ...

    def at(self, layer: int, first: int, count: int) -> Tensor:
        """Some rows of what `layer` left."""
        ...

    def clear(self) -> None:
        """Let go of all."""
        ...


class FileBuffer:
    """In two files in turn: while one is overwritten the states of the layer below stay whole in the other."""

    def __init__(self, directory: Path, stage: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """shape: (seq_len, d_model). stage: goes into the files' names."""
        self.checksum = 0  # of what the last turn wrote
        self._directory, self._stage, self._shape, self._dtype = directory, stage, shape, dtype
        self._row_nbytes = shape[0] * shape[1] * dtype.itemsize
        self._source: BinaryIO | None = None
        self._target: BinaryIO | None = None

    def path(self, layer: int) -> Path:
        """The file of a layer."""
        return self._directory / f"sweep-{self._stage}-{layer % 2}.states"

    @contextlib.contextmanager
    def turn(self, layer: int) -> Iterator[None]:
        """See `ActivationBuffer`."""
        for path in (self.path(layer), self.path(layer - 1)):
            path.touch()
        self.checksum = 0
        with self.path(layer).open("r+b") as self._target, self.path(layer - 1).open("rb") as self._source:
            yield
            self._target.truncate()  # what a longer state of another sweep has left
            self._target.flush()
            durable.sync(self._target.fileno())

    def holds(self, layer: int, checksum: int) -> bool:
        """Whether the file of a layer is there as it was written."""
        found = 0
        try:
            with self.path(layer).open("rb") as file:
                while piece := file.read(_PIECE_NBYTES):
                    found = zlib.crc32(piece, found)
        except OSError:
            return False
        return found == checksum

    def read(self, count: int) -> Tensor:
        """See `ActivationBuffer`."""
        assert self._source is not None
        return self._tensor(self._source, count)

    def write(self, hidden: Tensor) -> None:
        """See `ActivationBuffer`."""
        assert self._target is not None
        raw = hidden.detach().cpu().contiguous().view(torch.uint8).numpy().data
        self._target.write(raw)
        self.checksum = zlib.crc32(raw, self.checksum)

    def at(self, layer: int, first: int, count: int) -> Tensor:
        """See `ActivationBuffer`."""
        with self.path(layer).open("rb") as file:
            file.seek(first * self._row_nbytes)
            return self._tensor(file, count)

    def clear(self) -> None:
        """See `ActivationBuffer`."""
        for layer in (0, 1):
            self.path(layer).unlink(missing_ok=True)

    def _tensor(self, file: BinaryIO, count: int) -> Tensor:
        raw = bytearray(file.read(count * self._row_nbytes))
        return torch.frombuffer(raw, dtype=self._dtype).view(count, *self._shape)


class DeviceBuffer:
    """In one tensor on the device that the model runs on, moved on in place; nothing of it outlives the process."""

    def __init__(
        self, num_rows: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take the room for all candidates' rows at once."""
        self._states = torch.empty(num_rows, *shape, dtype=dtype, device=device)
        self._source = self._target = 0

    @contextlib.contextmanager
    def turn(self, layer: int) -> Iterator[None]:
        """See `ActivationBuffer`."""
        self._source = self._target = 0
        yield

    def read(self, count: int) -> Tensor:
        """See `ActivationBuffer`."""
        self._source += count
        return self._states[self._source - count : self._source]

    def write(self, hidden: Tensor) -> None:
        """See `ActivationBuffer`."""
        self._target += len(hidden)
        self._states[self._target - len(hidden) : self._target] = hidden

    def at(self, layer: int, first: int, count: int) -> Tensor:
        """See `ActivationBuffer`."""
        return self._states[first : first + count]

    def clear(self) -> None:
        """See `ActivationBuffer`."""
        self._states = self._states[:0].clone()
