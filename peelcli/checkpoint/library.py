"""What transformers raises over a checkpoint's files becomes a CheckpointError that names them."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

from peelcli.checkpoint.library_words import library_words
from peelcli.errors import CheckpointError, PeelError

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = {"transformers", "torch", "accelerate", "safetensors", "tokenizers", "huggingface_hub"}
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory")


@contextlib.contextmanager
def over_files(where: Path, doing: str, remedy: str) -> Iterator[None]:
    """Within it, an exception that comes from inside a library is an error of the checkpoint `where`.

    doing: what transformers cannot do, such as "build the model". An exception that peel's own code raised is a
    mistake in peel and goes on as it is; so do a lack of memory and a disk error.
    """
    try:
        yield
    except (PeelError, MemoryError, OSError):
        raise
    except Exception as error:
        if _is_own(error) or any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        raise CheckpointError(
            f"{where}: transformers cannot {doing} ({type(error).__name__}: {library_words(error)}). {remedy}"
        ) from error


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Within it, transformers prints no table of weights that do not fit: peel says so in its own words."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_drop)
    try:
        yield
    finally:
        logger.removeFilter(_drop)


def _drop(_: logging.LogRecord) -> bool:
    return False


def _is_own(error: BaseException) -> bool:
    """Whether `error` came up in peel's code, or in Python's as peel called it, and not in one of the libraries."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if _PACKAGE in file.resolve().parents:
            return True
        if _LIBRARIES & set(file.parts):
            return False
    return True
