"""Load the checkpoint's tokenizer offline and without remote code, and find its special token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from peelcli.checkpoint.files import CheckpointFiles
from peelcli.checkpoint.json_files import read_object_if_whole
from peelcli.checkpoint.library_words import library_words
from peelcli.errors import CalibrationError
from peelcli.records.special_ids import SpecialIds

SETTINGS = "tokenizer_config.json"
# Files that hold a vocabulary. A directory with one of them has a tokenizer.
VOCABULARY = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.*",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "*.spm",
    "tekken.json",
)
_NEEDS_PACKAGE = ("*.model", "*.spm", "*.tiktoken", "tokenizer.model.*")
_IDS_INSTEAD = "or pass token ids instead of text, with --data FILE.npy"
_LARGEST = 64 << 20  # bytes of the largest vocabulary file that is searched for one id


def load_tokenizer(directory: Path) -> Any | None:
    """The tokenizer in the checkpoint's directory; None if there is none.

    Raises CalibrationError, with the file and a remedy, if there is one that cannot be used.
    """
    found = _vocabularies(directory)
    if not found and not (directory / SETTINGS).is_file():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # the tokenizers library raises bare Exception for a damaged file
        raise CalibrationError(_why_not_opened(directory, found, error)) from error
    # Without a vocabulary file transformers makes an empty tokenizer. Only byte and character tokenizers need none.
    if not found and getattr(tokenizer, "vocab_files_names", {}):
        raise CalibrationError(_without_vocabulary(directory))
    return tokenizer


def _vocabularies(directory: Path) -> list[str]:
    names = sorted(path.name for path in directory.glob("*") if path.is_file())
    return [name for name in names if any(fnmatch(name, pattern) for pattern in VOCABULARY)]


def _why_not_opened(directory: Path, found: list[str], error: Exception) -> str:
    remote = _remote_class(directory)
    if remote is not None and "trust_remote_code" in str(error):
        return (
            f"{directory / SETTINGS}: the tokenizer is code of the checkpoint's own ({remote!r} in auto_map), which "
            "peel never runs. Tokenize the text where you trust that code, save the ids with numpy.save, one "
            "sequence a row, and pass them with --data FILE.npy"
        )
    if not found:
        return _without_vocabulary(directory)
    packed = [name for name in found if any(fnmatch(name, pattern) for pattern in _NEEDS_PACKAGE)]
    missing = [package for package in ("sentencepiece", "tiktoken") if find_spec(package) is None]
    if packed and missing and "tokenizer.json" not in found:
        return (
            f"{directory / packed[0]}: cannot be read without the package {' or '.join(missing)}, which is not "
            f"installed here. Install it (`pip install {' '.join(missing)}`), copy the tokenizer.json of the model "
            f"that it was trained from into the directory, which needs no package, {_IDS_INSTEAD}"
        )
    return (
        f"{directory}: its tokenizer ({', '.join(found[:3])}) cannot be opened: {library_words(error)}. "
        f"Copy the tokenizer's files again from the model that it was trained from, {_IDS_INSTEAD}"
    )


def _without_vocabulary(directory: Path) -> str:
    return (
        f"{directory / SETTINGS}: names a tokenizer, but no file with its vocabulary lies beside it (expected "
        "tokenizer.json, tokenizer.model, or vocab.json with merges.txt). Copy tokenizer.json and "
        f"tokenizer_config.json of the model that it was trained from into the directory, {_IDS_INSTEAD}"
    )


def _remote_class(directory: Path) -> str | None:
    """The tokenizer class in the checkpoint's own code, if tokenizer_config.json names one."""
    named = read_object_if_whole(directory / SETTINGS).get("auto_map")
    if isinstance(named, dict):
        named = named.get("AutoTokenizer")
    classes = named if isinstance(named, list) else [named]
    return next((name for name in classes if isinstance(name, str)), None)


# -- special token ids ---------------------------------------------------------------------------------------------


def special_ids(files: CheckpointFiles) -> SpecialIds:
    """The ids of BOS, EOS and padding, from config.json, generation_config.json and the tokenizer's JSON files.

    If the files disagree, all ids count. A damaged file is ignored, because auditing token ids needs no tokenizer.
    """
    nested = files.config.get("text_config")
    configs = [
        files.config,
        nested if isinstance(nested, dict) else {},
        read_object_if_whole(files.directory / "generation_config.json"),
    ]
    found = {
        mark: frozenset(token for config in configs for token in _ids(config.get(f"{mark}_token_id")))
        for mark in ("bos", "eos", "pad")
    }
    of_tokenizer = frozenset(_pad_of_tokenizer(files.directory))
    return SpecialIds(found["bos"], found["eos"], found["pad"] | of_tokenizer)


def _ids(value: object) -> list[int]:
    """The ids in a setting that holds one id or a list. Negative values are dropped: old configs use -1 for none."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _pad_of_tokenizer(directory: Path) -> Iterator[int]:
    settings = read_object_if_whole(directory / SETTINGS)
    token = _content(settings.get("pad_token"))
    if token is None:
        token = _content(read_object_if_whole(directory / "special_tokens_map.json").get("pad_token"))
    if token is None:
        return
    by_id = settings.get("added_tokens_decoder")
    for number, entry in by_id.items() if isinstance(by_id, Mapping) else ():
        if _content(entry) == token and number.isdigit():
            yield int(number)
    whole = read_object_if_whole(directory / "tokenizer.json")
    added = whole.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if _content(entry) == token and isinstance(entry, Mapping):
            yield from _ids(entry.get("id"))
    model = whole.get("model")
    for vocabulary in (
        model.get("vocab") if isinstance(model, Mapping) else None,
        read_object_if_whole(directory / "added_tokens.json"),
        read_object_if_whole(directory / "vocab.json"),
    ):
        if isinstance(vocabulary, Mapping):
            yield from _ids(vocabulary.get(token))


def _content(token: object) -> str | None:
    """The text of a token, which the files store as a string or as an object with `content`."""
    value = token.get("content") if isinstance(token, Mapping) else token
    return value if isinstance(value, str) else None
