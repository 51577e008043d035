"""Read token ids from .npy and nanoGPT .bin files in bounded memory, and check them against the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peelcli.calibration.files import spread_slices
from peelcli.calibration.split import spread_indices
from peelcli.calibration.token_ids import Segment
from peelcli.calibration.vocabulary import check_ids
from peelcli.errors import CalibrationError

_SLICE_IDS = 1 << 16
_REMEDY = (
    "the file was made with another tokenizer or holds another type: pass data made for this checkpoint (a negative id "
    "is a mark in labels, such as -100: pass the input ids instead)"
)


def read_segments(
    paths: Sequence[Path], vocab_size: int, max_ids: int, rng: np.random.Generator
) -> list[Segment]:
    """The token ids of .npy and .bin files, in order, at most about `max_ids` in total.

    A 1-D array is a stream, each row of a 2-D array a sequence. Raises CalibrationError on files of another
    content and on ids outside [0, vocab_size).
    """
    segments: list[Segment] = []
    for path in paths:
        try:
            array = _open_npy(path) if path.suffix.lower() == ".npy" else _open_bin(path, vocab_size)
        except OSError as error:
            raise CalibrationError(f"{path}: cannot be read ({error}); check its permissions") from error
        limit = max_ids // len(paths)
        read = _stream if array.ndim == 1 else _sequences
        segments.extend(read(path, array, vocab_size, limit, rng))
    return segments


def _stream(
    path: Path, array: np.ndarray, vocab_size: int, limit: int, rng: np.random.Generator
) -> list[Segment]:
    segments = []
    for start, stop in spread_slices(len(array), max(1, limit), _SLICE_IDS, rng):
        ids = np.array(array[start:stop])

        def where(index: tuple[int, ...], start: int = start) -> str:
            return f"position {start + index[0]} of {path}"

        check_ids(ids, vocab_size, where, _REMEDY)
        segments.append(Segment(ids, begins=False))
    return segments


def _sequences(
    path: Path, array: np.ndarray, vocab_size: int, limit: int, rng: np.random.Generator
) -> list[Segment]:
    n_rows = max(1, limit // max(1, array.shape[1]))
    kept = np.arange(len(array)) if len(array) <= n_rows else spread_indices(len(array), n_rows, rng)
    rows = np.array(array[kept])
    check_ids(rows, vocab_size, lambda index: f"row {kept[index[0]]}, column {index[1]} of {path}", _REMEDY)
    return [Segment(row, begins=True) for row in rows]


def _open_npy(path: Path) -> np.ndarray:
    """The memory-mapped array, (n_ids,) or (n_sequences, n_ids) of any integer type."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:  # not .npy, cut short, or pickled objects, which are never loaded
        if "Python objects" in str(error) or "allow_pickle" in str(error):
            raise CalibrationError(
                f"{path}: expected a .npy array of token ids (integers), found pickled Python objects, which are never "
                "loaded (rows of different lengths?); pad the rows to one length with the checkpoint's pad id, which "
                "is left out again, and numpy.save them as an integer array"
            ) from error
        raise CalibrationError(
            f"{path}: expected a .npy array of token ids, found none ({error}); save the ids with numpy.save"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise CalibrationError(
            f"{path}: expected a 1-D or 2-D array of integer token ids, found {found}; "
            f"{_how_to_reshape(array)} and numpy.save them"
        )
    return array


def _how_to_reshape(array: object) -> str:
    if not isinstance(array, np.ndarray):
        return "take the array of ids out of the archive"
    if array.dtype.kind == "f":
        return "if its values are whole numbers, convert them with .astype('int32'); logits and embeddings are no ids;"
    if array.dtype.kind in "iu" and array.ndim > 2:
        return "make one sequence a row with .reshape(-1, ids.shape[-1])"
    return "make the ids integers, one sequence a row,"


def _open_bin(path: Path, vocab_size: int) -> np.ndarray:
    """A memory-mapped nanoGPT stream, (n_ids,) of uint16, or uint32 for large vocabularies."""
    dtype = np.dtype("<u4" if vocab_size > 65536 else "<u2")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise CalibrationError(
            f"{path}: expected {dtype.name} token ids, since the vocabulary has {vocab_size} entries, found "
            f"{size} bytes, which is not a whole, positive number of them; save the ids as that type with numpy's "
            "tofile, or with numpy.save as .npy, which knows its type"
        )
    return np.memmap(path, dtype=dtype, mode="r")
