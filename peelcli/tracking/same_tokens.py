"""Check that runs were measured on the same calibration tokens, since other losses cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from peelcli.errors import UsageError
from peelcli.records import Run


@dataclass(frozen=True)
class Tokens:
    """The calibration tokens of one checkpoint: their hash ("" if none were read), and their origin."""

    checkpoint: str
    data_hash: str
    data: str
    tokens: dict[str, int]
    seq_len: int
    seed: int
    vocab_size: int


# What may differ, as it is called in a message.
_TRAITS = {
    "data": "the text",
    "tokens": "the tokens of each part",
    "seq_len": "the sequence length",
    "seed": "the seed",
    "vocab_size": "the vocabulary size",
}


def tokens_of(run: Run) -> Tokens:
    """The tokens that a run was measured on."""
    return Tokens(run.checkpoint, run.data_hash, run.data, run.tokens, run.seq_len, run.seed, run.vocab_size)


def require_same_tokens(first: Tokens, other: Tokens) -> None:
    """Raise UsageError if the same settings give different tokens for two checkpoints of a series."""
    if "" in (first.data_hash, other.data_hash) or first.data_hash == other.data_hash:
        return
    raise UsageError(
        f"{other.checkpoint}: its calibration tokens are not those of {first.checkpoint}, so that the losses of the "
        f"two cannot be compared. What differs: {_what_differs(first, other)}. Audit the two apart, or give both the "
        "same tokens: the same tokenizer files or token ids (--data FILE.npy), and a --seq-len that both can take."
    )


def require_comparable(runs: Sequence[tuple[PurePath, Run]]) -> None:
    """Raise UsageError if fits (file, run) were measured on different tokens; the message groups those that match.

    A run on which nothing was measured goes with any.
    """
    groups: dict[str, list[tuple[PurePath, Tokens]]] = {}
    for file, run in runs:
        if run.data_hash:
            groups.setdefault(run.data_hash, []).append((file, tokens_of(run)))
    if len(groups) < 2:
        return
    lines = ["the fits were measured on different tokens, so that their losses cannot be compared."]
    (_, first), *_ = next(iter(groups.values()))
    for number, group in enumerate(groups.values(), start=1):
        files = ", ".join(f"{file} ({PurePath(tokens.checkpoint).name})" for file, tokens in group)
        against = f"; other than in group 1: {_what_differs(first, group[0][1])}" if number > 1 else ""
        lines.append(f"group {number}: {files}{against}")
    lines.append(
        "Report each group on its own, or extract and fit again with one text, seed, tokenizer and --seq-len."
    )
    raise UsageError(*lines)


def _what_differs(first: Tokens, other: Tokens) -> str:
    """The recorded properties in which two runs' tokens differ, with both values; if none differs, the tokenizer."""
    found = [
        f"{words} ({_value(mine)} and {_value(its)})"
        for name, words in _TRAITS.items()
        if (mine := getattr(first, name)) != (its := getattr(other, name))
    ]
    return ", ".join(found) or "the tokenizer, or what the text of that name holds"


def _value(value: str | int | dict[str, int]) -> str:
    if isinstance(value, dict):
        return " + ".join(f"{count} {part}" for part, count in value.items())
    return str(value)
