"""Build a calibration set from files. The stages call only `build_calibration`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peelcli.calibration.files import holds_text
from peelcli.calibration.padding import without_padding
from peelcli.calibration.split import MIN_SEQUENCES, PARTS, Split, shrink_counts, split_rows, wanted_counts
from peelcli.calibration.text import TextPool
from peelcli.calibration.text_files import default_text, read_documents
from peelcli.calibration.token_files import read_segments
from peelcli.calibration.token_ids import TokenPool
from peelcli.errors import CalibrationError, UsageError
from peelcli.records import Finding
from peelcli.records.special_ids import NO_SPECIAL_IDS, SpecialIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SEQ_LEN = 256
SHORTEST_SEQ_LEN = 8  # asked for; nothing below gives attention anything to do
_SHORTEST_FALLBACK = 32  # chosen by peel itself when the text is short
_MAX_BYTES = 64 << 20
_MAX_IDS = 4 << 20


@dataclass(frozen=True, eq=False)
class Calibration:
    """The sequences that a checkpoint is audited on, and their description for the report."""

    split: Split
    seq_len: int
    description: str  # which text, in words, without directories
    content_hash: str  # SHA-256 of the ids and of how they are divided
    vocab_size: int
    starts_with_bos: bool  # every sequence does
    notes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()  # what of the data was left out, or does not fit the checkpoint

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens per part, such as {"fit": 16384, "select": 8192, "eval": 16384}."""
        return {part: getattr(self.split, part).size for part in PARTS}


def build_calibration(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    max_positions: int | None,
    seq_len: int | None,
    tokens: Mapping[str, int],
    seed: int,
    special: SpecialIds = NO_SPECIAL_IDS,
) -> Calibration:
    """Choose sequences and split them into fit, select and eval. The same arguments give the same ids.

    `paths`: .txt, .jsonl (`text` field), .npy or .bin of token ids; none means the Python language reference.
    `vocab_size` and `max_positions` are the checkpoint's. `seq_len` None means at most 256, less where the
    text is too short for that. `tokens` holds the budget of each part in tokens; each part gets at least 8
    sequences, and where the text is too short all three shrink in proportion, with a note. `special`: what the
    checkpoint's files say of ids; padding is cut out of given token ids, and a finding counts it.

    Raises UsageError on a `seq_len` or budget that cannot be, CalibrationError on data that cannot be used.
    """
    _check_request(max_positions, seq_len, tokens)
    rng = np.random.default_rng([seed, 1])
    description = _describe(paths)
    wanted_tokens = sum(tokens[part] for part in PARTS)
    pool = _open_pool(paths, tokenizer, vocab_size, wanted_tokens, description, rng, special)
    for length in _lengths(seq_len, max_positions, pool.longest):
        wanted = wanted_counts(tokens, length)
        rows, found_notes = pool.rows(length, sum(wanted), rng)
        if len(rows) >= MIN_SEQUENCES * len(PARTS):
            break
    else:
        raise _too_short(description, pool, len(rows), length)
    counts = shrink_counts(wanted, len(rows))
    notes = [*found_notes, *_shortage_notes(wanted, counts, length, seq_len, max_positions)]
    split = split_rows(rows, counts, seed)
    return Calibration(
        split=split,
        seq_len=length,
        description=description,
        content_hash=split.content_hash,
        vocab_size=vocab_size,
        starts_with_bos=pool.bos is not None and bool((split.sequences[:, 0] == pool.bos).all()),
        notes=tuple(notes),
        findings=pool.findings,
    )


def _check_request(max_positions: int | None, seq_len: int | None, tokens: Mapping[str, int]) -> None:
    if set(tokens) != set(PARTS) or any(budget < 1 for budget in tokens.values()):
        raise UsageError(
            f"tokens: expected a positive budget for each of {', '.join(PARTS)}, found {dict(tokens)}; "
            f"give all three"
        )
    if seq_len is not None and seq_len < SHORTEST_SEQ_LEN:
        raise UsageError(
            f"seq-len: expected at least {SHORTEST_SEQ_LEN} tokens, found {seq_len}; ask for longer sequences"
        )
    if seq_len is not None and max_positions is not None and seq_len > max_positions:
        raise UsageError(
            f"seq-len: expected at most {max_positions}, the checkpoint's number of positions, found "
            f"{seq_len}; ask for shorter sequences"
        )
    if max_positions is not None and max_positions < SHORTEST_SEQ_LEN:
        raise CalibrationError(
            f"the checkpoint has {max_positions} positions; expected at least {SHORTEST_SEQ_LEN}, since "
            f"shorter sequences cannot tell a layer's worth; check its config.json"
        )


def _describe(paths: Sequence[Path]) -> str:
    if not paths:
        return "the Python language reference (pydoc_data.topics)"
    names = ", ".join(path.name for path in paths[:3])
    return names if len(paths) <= 3 else f"{names} and {len(paths) - 3} more"


def _open_pool(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    wanted_tokens: int,
    description: str,
    rng: np.random.Generator,
    special: SpecialIds,
) -> TextPool | TokenPool:
    # Several times what is wanted, so that there is a choice; a file beyond that is read in slices.
    max_bytes, max_ids = max(_MAX_BYTES, 32 * wanted_tokens), max(_MAX_IDS, 4 * wanted_tokens)
    is_text = holds_text(paths) if paths else True
    if not is_text:
        bos = None if tokenizer is None else tokenizer.bos_token_id
        eos = None if tokenizer is None else tokenizer.eos_token_id
        segments, padding = without_padding(read_segments(paths, vocab_size, max_ids, rng), special)
        if padding and not segments:
            raise CalibrationError(
                f"{description}: expected token ids of text, found nothing but padding (id "
                f"{' and '.join(map(str, padding))}); pass other data with --data"
            )
        return TokenPool(segments, bos, eos, padding, description)
    if tokenizer is None:
        raise CalibrationError(
            f"{description}: expected a tokenizer to turn this text into token ids, but the checkpoint has "
            f"no tokenizer; copy tokenizer.json (and tokenizer_config.json) of the model that it was trained from "
            f"into its directory, or pass token ids with --data FILE.npy or --data FILE.bin"
        )
    documents = read_documents(paths, max_bytes, rng) if paths else [default_text()]
    return TextPool(documents, tokenizer, vocab_size, description)


def _lengths(seq_len: int | None, max_positions: int | None, longest: int | None) -> list[int]:
    """The sequence lengths to try, in this order: the requested one only, or shorter and shorter ones."""
    if seq_len is not None:
        return [seq_len]
    limits = [limit for limit in (DEFAULT_SEQ_LEN, max_positions, longest) if limit is not None]
    lengths = [max(SHORTEST_SEQ_LEN, min(limits))]
    while lengths[-1] // 2 >= _SHORTEST_FALLBACK:
        lengths.append(lengths[-1] // 2)
    return lengths


def _too_short(description: str, pool: TextPool | TokenPool, found: int, seq_len: int) -> CalibrationError:
    needed = MIN_SEQUENCES * len(PARTS)
    rows = "" if pool.longest is None else f", in rows of at most {pool.longest}"
    left_out = f" ({pool.findings[0].message})" if pool.findings else ""
    enough = pool.n_tokens >= 2 * needed * seq_len
    cause = "; most of it is alike, and each sequence counts once" if enough and pool.longest is None else ""
    more = "other text" if cause else "more text"
    return CalibrationError(
        f"{description}: expected at least {needed} different sequences of {seq_len} tokens, that is "
        f"{needed * seq_len} tokens and some between them, found {found}: there are about {pool.n_tokens} "
        f"tokens in all{rows}{left_out}{cause}; pass {more} with --data, or ask for shorter sequences with --seq-len"
    )


def _shortage_notes(
    wanted: tuple[int, int, int],
    counts: tuple[int, int, int],
    length: int,
    seq_len: int | None,
    max_positions: int | None,
) -> list[str]:
    notes = []
    usual = min(DEFAULT_SEQ_LEN, max_positions or DEFAULT_SEQ_LEN)
    if seq_len is None and length < usual:
        notes.append(f"the text is too short for sequences of {usual} tokens, so they have {length}")
    if counts != wanted:
        asked, given = (" + ".join(str(count * length) for count in part) for part in (wanted, counts))
        notes.append(
            f"the text is too short for the tokens asked for ({asked} for {', '.join(PARTS)}), "
            f"so there are {given}"
        )
    return notes
