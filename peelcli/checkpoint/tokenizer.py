"""The checkpoint's own tokenizer, from its directory, offline, without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from peelcli.errors import CalibrationError
from peelcli.library_words import library_words

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def load_tokenizer(directory: Path) -> Any | None:
    """The tokenizer beside the weights, or None where there is none."""
    if not any((directory / name).is_file() for name in FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # the tokenizers library raises bare Exception for a damaged file
        raise CalibrationError(
            f"{directory}: its tokenizer cannot be opened: {library_words(error)}. Mend it, or pass token ids with "
            "--data FILE.npy."
        ) from error
