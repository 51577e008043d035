"""Read one `.bin` file, a pickled state dict, with torch's weights-only unpickler, which executes no code."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from peelcli.checkpoint.pickle_size import require_small
from peelcli.checkpoint.reading import StoredTensor
from peelcli.errors import CheckpointError

# The exceptions that torch.load was seen to raise on damaged files.
_DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)
_SAVE_ANEW = "load it where you trust it and save the model with save_pretrained, which writes safetensors"


def list_tensors(file: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name → (dtype as torch names it, shape, bytes), in the order of the file.

    Raises CheckpointError where the file is damaged or holds anything but a flat dict of name → dense tensor.
    """
    require_small(file)
    return {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.nbytes)
        for name, tensor in _load(file).items()
    }


def stored_tensors(file: Path) -> dict[str, StoredTensor | torch.Tensor]:
    """The place of each tensor in the file. Files of the format before torch 1.6 are read whole and give tensors."""
    found: dict[str, StoredTensor | torch.Tensor] = {}
    for name, tensor in _load(file).items():
        if not isinstance(tensor, FakeTensor):
            found[name] = tensor
            continue
        begin = int(tensor.untyped_storage()._checkpoint_offset or 0)
        found[name] = StoredTensor(
            file,
            name,
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            begin + int(tensor.storage_offset()) * tensor.element_size(),
            None if tensor.is_contiguous() else tensor.stride(),
        )
    return found


@contextmanager
def opened(file: Path) -> Iterator[Callable[[str, slice | None], torch.Tensor]]:
    """Yields `read(name, rows)`: a tensor, or a slice of its first dimension, on the CPU."""
    tensors = stored_tensors(file)

    def read(name: str, rows: slice | None) -> torch.Tensor:
        if name not in tensors:
            raise CheckpointError(f"{file}: tensor {name!r} is no longer in the file; let no one write to it")
        tensor = tensors[name]
        if isinstance(tensor, StoredTensor):
            return tensor.read(rows)
        return tensor if rows is None else tensor[rows]

    yield read


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        # Fake tensors record each tensor's place in the archive and hold no data. Files from before torch 1.6 are not
        # zip archives, so only those are read whole.
        with FakeTensorMode() if zipfile.is_zipfile(file) else nullcontext():
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{file}: contains something other than tensors{named}, or is damaged; expected a pickled dict "
            f"of tensors only. Nothing of it was executed; {_SAVE_ANEW}"
        ) from error
    except _DAMAGE as error:
        reason = re.split(r"\n|\. ", str(error).strip())[0] or type(error).__name__
        raise CheckpointError(
            f"{file}: truncated or damaged ({reason}); copy or download the file again"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds a {_kind(state)}, not a dict of tensors; {_SAVE_ANEW}")
    _require_dense(file, state)
    return state


def _kind(value: object) -> str:
    return type(value).__name__.removeprefix("Fake")


def _named(key: object) -> str:
    return repr(key) if isinstance(key, (str, int)) else f"with a {type(key).__name__} for a name"


def _require_dense(file: Path, state: dict[object, object]) -> None:
    size = file.stat().st_size
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{file}: entry {_named(name)} is a {_kind(tensor)}, expected a flat dict of name → tensor "
                f"(a trainer's own file?); {_SAVE_ANEW}"
            )
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        dense &= not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        nbytes = tensor.numel() * tensor.element_size()
        # A stride of 0 lets a few bytes claim to be terabytes.
        if not dense or nbytes > size:
            raise CheckpointError(
                f"{file}: tensor {name!r} is not a plain dense tensor (layout {tensor.layout}, device "
                f"{tensor.device}, {nbytes:,} bytes in a file of {size:,}); {_SAVE_ANEW}"
            )
