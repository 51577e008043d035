"""Check that text, tokenizer and embedding match.

The border check on token ids is strict: an id outside the embedding would crash a GPU and silently wrap in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from peelcli.errors import CalibrationError
from peelcli.records import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_UNKNOWN, _NOTED = (
    0.5,
    0.05,
)  # parts of the tokens: beyond the one nothing is measured, beyond the other is said


def check_ids(ids: np.ndarray, vocab_size: int, where: Callable[[tuple[int, ...]], str], remedy: str) -> None:
    """Raise CalibrationError for the first id outside [0, vocab_size).

    `where` puts its index into words, `remedy` says what to do.
    """
    outside = (ids < 0) | (ids >= vocab_size)
    if not outside.any():
        return
    index = tuple(int(i) for i in np.unravel_index(int(outside.argmax()), ids.shape))
    raise CalibrationError(
        f"token id {int(ids[index])} at {where(index)}: expected ids from 0 to {vocab_size - 1}, "
        f"since the checkpoint's vocabulary has {vocab_size} entries; {remedy}"
    )


def unknown_tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, samples: Sequence[str], encoded: Sequence[Sequence[int]]
) -> tuple[Finding, ...]:
    """A finding if the tokenizer does not know part of the text. Raises CalibrationError if that is most of it.

    `samples` are pieces of the text, `encoded` their token ids.
    """
    ids = np.concatenate([np.asarray(piece, dtype=np.int64) for piece in encoded])
    unknown = _unknown_marks(tokenizer)
    mark = " or ".join(sorted(unknown))
    part = float(np.isin(ids, list(unknown.values())).mean()) if len(ids) else 0.0
    dropped = _dropped_part(tokenizer, samples, encoded)
    if max(part, dropped) > _MOST_UNKNOWN:
        found = f"{part:.0%} of its tokens are {mark}" if part >= dropped else f"it drops {dropped:.0%} of it"
        where = f" in {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
        raise CalibrationError(
            f"{name}: the checkpoint's tokenizer{where} ({len(tokenizer):,} entries) does not know this text: {found}, "
            "expected text that it was made for. Pass text in the model's language with --data FILE.txt; if the "
            "tokenizer is another model's, put the right tokenizer.json beside the weights, or pass token ids as "
            "--data FILE.npy"
        )
    if part <= _NOTED:
        return ()
    message = (
        f"{part:.0%} of the tokens of {name} are {mark}, which stands for what the tokenizer does not know: the loss "
        "is that of a text with these gaps. Pass text in the model's language with --data"
    )
    return (Finding("unknown-tokens", message),)


def _unknown_marks(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens for unknown text: the declared one, and those in the vocabulary with usual names."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = getattr(getattr(backend, "model", None), "unk_token", None)
    vocabulary = tokenizer.get_vocab()
    return {mark: vocabulary[mark] for mark in (tokenizer.unk_token, own) if mark in vocabulary}


def _dropped_part(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[str], encoded: Sequence[Sequence[int]]
) -> float:
    """The share of the text's non-blank characters that the tokens lost."""
    size = sum(len("".join(sample.split())) for sample in samples)
    kept = sum(len("".join(str(tokenizer.decode(list(ids))).split())) for ids in encoded)
    return max(0.0, 1 - kept / size) if size else 0.0


def vocabulary_finding(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[Finding, ...]:
    """A finding if the tokenizer is probably not the one that the checkpoint was trained with."""
    size = len(tokenizer)
    if size > vocab_size:
        message = (
            f"the tokenizer has {size:,} entries and the model's embedding {vocab_size:,}: none of those beyond occurs "
            "in this text. Were tokens added without resize_token_embeddings, or is the tokenizer another model's?"
        )
    elif 2 * size < vocab_size:
        message = (
            f"the tokenizer has {size:,} entries and the model's embedding {vocab_size:,}: if it is another model's, "
            "this text means nothing to the model, and its loss is high for that reason alone"
        )
    else:
        return ()
    return (Finding("tokenizer", message),)
