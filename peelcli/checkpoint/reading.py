"""Read tensors from files with plain reads instead of memory mapping.

If a mapped file is truncated, touching a lost page kills the process with SIGBUS. A plain read returns fewer bytes,
which can be reported.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_utils

from peelcli.errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file. offset: byte of its first element. dtype: torch's name.

    stride: of the elements in the file, as torch counts; None for a contiguous tensor.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...] | None = None

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor or a slice of its first dimension, on the CPU. Raises CheckpointError if the file is too short."""
        dtype = getattr(torch, self.dtype)
        if self.stride is not None:
            last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
            whole = self._read(0, (last + 1,), dtype).as_strided(self.shape, self.stride)
            return whole if rows is None else whole[rows]
        if rows is None or not self.shape:
            return self._read(0, self.shape, dtype)
        start, stop, step = rows.indices(self.shape[0])
        count = max(0, stop - start)
        row = math.prod(self.shape[1:]) * dtype.itemsize
        return self._read(start * row, (count, *self.shape[1:]), dtype)[::step]

    def _read(self, skipped: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        left = raw.numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset + skipped)
                while left and (count := file.readinto(left)):
                    left = left[count:]
        except OSError as error:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} cannot be read ({error.strerror}); copy or download the file again"
            ) from error
        if left:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} is cut short: {len(left):,} bytes are missing at the end of the "
                "file; copy or download the file again"
            )
        return raw.view(dtype).view(shape)

    # -- the interface of safetensors' slices, which transformers uses ---------------------------------------------

    def __getitem__(self, rows: Any) -> Tensor:
        return self.read() if rows is ... else self.read()[rows]

    def get_shape(self) -> list[int]:
        """The shape, under the name that safetensors' slices give it."""
        return list(self.shape)


class _Unmapped:
    """Has the interface of safetensors' `safe_open`, but reads tensors with plain reads."""

    def __init__(self, tensors: Mapping[str, StoredTensor | Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}

    def get_slice(self, name: str) -> StoredTensor | Tensor:
        return self._tensors[name]

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name][...]

    def __enter__(self) -> _Unmapped:
        return self

    def __exit__(self, *_: object) -> None:
        pass


Table = Callable[[Path], Mapping[str, StoredTensor | Tensor]]


@contextlib.contextmanager
def transformers_unmapped(safetensors: Table, pickles: Table) -> Iterator[None]:
    """Within the context, transformers maps no checkpoint file into memory.

    transformers opens files with two functions of its module `modeling_utils` and offers no hook, so both are replaced.
    safetensors, pickles: functions from a file to its tensors by name.
    """

    def open_safetensors(file: str, *_: Any, **__: Any) -> _Unmapped:
        return _Unmapped(safetensors(Path(file)))

    own_state_dict = modeling_utils.load_state_dict

    def load_state_dict(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith(".safetensors"):
            return own_state_dict(file, *args, **kwargs)
        return dict(pickles(Path(file)))

    before = {name: getattr(modeling_utils, name) for name in ("safe_open", "load_state_dict")}
    instead = {"safe_open": open_safetensors, "load_state_dict": load_state_dict}
    try:
        for name, function in instead.items():
            setattr(modeling_utils, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(modeling_utils, name, function)
