"""Compute the expanded size of a pickle from its opcodes, before any object is built.

A tuple may contain another tuple twice, and that one a third tuple twice. 34 such levels take a hundred bytes in the
file, and hashing the outermost takes 2³⁴ steps. A state dict of tensors contains nothing like that, so it is refused.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from peelcli.errors import CheckpointError

MAX_UNFOLDED = 100_000  # values in one tuple, including those in nested tuples; a tensor's tuple has a dozen
MAX_NBYTES = 256 * 2**20  # bytes of opcodes; a tensor takes a few hundred
_LEGACY_PICKLES = 5  # magic number, version, system, the state dict, the keys of its storages
_ALLOCATES = {"bytearray"}  # an allowed global that allocates as many bytes as the pickle says
_IN_PLACE = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_GETS, _PUTS = {"GET", "BINGET", "LONG_BINGET"}, {"PUT", "BINPUT", "LONG_BINPUT"}
_SAVE_ANEW = "load it where you trust it and save the model with save_pretrained, which writes safetensors"
_AGAIN = "copy or download the file again"


class _Mark:
    """Marks where the items of a tuple, list or dict begin on the stack."""


_Cell = list[int]  # one number: the values in an object, including itself; a list, since lists and dicts grow


def require_small(file: Path) -> None:
    """Raise CheckpointError if unpickling `file` would take far more time or memory than its size suggests."""
    status = file.stat()
    _require_small(file, (status.st_size, status.st_mtime_ns, status.st_ino))


@lru_cache(maxsize=1024)  # a checkpoint is opened several times in an audit, and its opcodes take seconds
def _require_small(file: Path, _: tuple[int, int, int]) -> None:
    try:
        for stream in _pickles(file):
            _walk(file, stream)
    except (
        ValueError,
        IndexError,
        KeyError,
        EOFError,
        OSError,
        zipfile.BadZipFile,
        NotImplementedError,
    ) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{file}: truncated or damaged ({reason}); {_AGAIN}") from error


def _pickles(file: Path) -> Iterator[BinaryIO]:
    """The pickles in a file that torch.save wrote: one member of a zip archive, or several in a row."""
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            for _ in range(_LEGACY_PICKLES):
                if not stream.peek(1):
                    return  # fewer pickles than torch.save writes; torch.load reports that
                yield stream
        return
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.filename.endswith("/data.pkl") and member.filename != "data.pkl":
                continue
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > MAX_NBYTES:
                raise CheckpointError(
                    f"{file}: {member.filename} is compressed, or has {member.file_size:,} bytes; expected what "
                    f"torch.save writes, at most {MAX_NBYTES:,} bytes; {_SAVE_ANEW}"
                )
            yield io.BytesIO(archive.read(member))


def _walk(file: Path, stream: BinaryIO) -> None:
    """Simulate the opcodes of one pickle with the sizes of objects in place of the objects."""
    stack: list[_Cell | _Mark] = []
    memo: dict[int, _Cell | _Mark] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _GETS:
            stack.append(memo[int(str(argument))])
        elif name in _PUTS:
            memo[int(str(argument))] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "MARK":
            stack.append(_Mark())
        else:
            if name == "GLOBAL" and str(argument).split()[-1] in _ALLOCATES:
                raise CheckpointError(
                    f"{file}: contains something other than tensors ({argument}); {_SAVE_ANEW}"
                )
            _step(file, opcode, stack)


def _step(file: Path, opcode: pickletools.OpcodeInfo, stack: list[_Cell | _Mark]) -> None:
    """Apply one opcode to the stack of sizes."""
    taken = 0
    before = list(opcode.stack_before)
    if any(item is pickletools.stackslice for item in before):
        while not isinstance(cell := stack.pop(), _Mark):
            taken += cell[0]
        before = before[: before.index(pickletools.markobject)]
    target: _Cell | None = None
    for _ in before:
        cell = stack.pop()
        if isinstance(cell, _Mark):
            continue
        taken, target = taken + cell[0], cell
    if opcode.name in _IN_PLACE and target is not None:
        target[0] = taken  # the target's own size was counted with what it takes up
        stack.append(target)
        return
    size = 1 + taken
    if opcode.name.startswith("TUPLE") and size > MAX_UNFOLDED:
        raise CheckpointError(
            f"{file}: contains something other than tensors: a tuple of tuples with more than {MAX_UNFOLDED:,} values; "
            f"{_SAVE_ANEW}"
        )
    stack.extend([size] for _ in opcode.stack_after)
