"""Turn exceptions of transformers about a checkpoint's files into CheckpointErrors that name the files."""

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
    """Within the context, an exception from inside a library becomes a CheckpointError about `where`.

    doing: what transformers cannot do, such as "build the model". remedy: the sentence that ends the message.
    An exception raised by peel's own code is a bug and passes unchanged; so do memory and disk errors.
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
    """Within the context, transformers prints no table of weights that do not fit; peel reports them itself."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_drop)
    try:
        yield
    finally:
        logger.removeFilter(_drop)


def _drop(_: logging.LogRecord) -> bool:
    return False


def _is_own(error: BaseException) -> bool:
    """Whether `error` was raised by peel's code, or by Python code that peel called, and not by a library."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if _PACKAGE in file.resolve().parents:
            return True
        if _LIBRARIES & set(file.parts):
            return False
    return True
