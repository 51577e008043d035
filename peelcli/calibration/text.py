"""Text → sequences, each tokenised separately from the place where it begins."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from peelcli.calibration.encoder import Encoder
from peelcli.calibration.split import spread_indices
from peelcli.calibration.starts import Place, next_start, next_word
from peelcli.calibration.vocabulary import check_ids, unknown_tokens, vocabulary_finding
from peelcli.errors import CalibrationError
from peelcli.records import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLES, _SAMPLE_CHARS = 16, 2000
_MARGIN = 8  # ids tokenised beyond the cut, so that the piece's ragged end changes none that are kept
_WAIT = 1.25  # characters a sequence takes up, with the way to the next start, as a multiple of its own

Start = Callable[[Sequence[str], Place], Place | None]  # where the next sequence begins, at or after a place


class TextPool:
    """Documents from which sequences are cut. Only the cut pieces are tokenised, so the text may be very large."""

    longest: int | None = None  # a sequence can be as long as the text

    def __init__(
        self, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int, name: str
    ) -> None:
        """name: describes the text. Raises CalibrationError if there is no text, or if it yields no token."""
        self._documents, padding = _split_documents(documents, tokenizer)
        if not self._documents:
            raise CalibrationError(
                f"{name}: expected text, found none (it is empty, or holds blanks and end marks only); pass other "
                "text with --data FILE.txt"
            )
        self._offsets = np.cumsum([0] + [len(document) for document in self._documents])
        self._size = int(self._offsets[-1])
        samples = self._samples()
        self._encoder = Encoder(tokenizer, "".join(samples)[:_SAMPLE_CHARS])
        encoded = [self._encoder.encode(sample)[0] for sample in samples]
        self._chars_per_token = sum(map(len, samples)) / max(1, sum(map(len, encoded)))
        self.findings = (
            *_padding_finding(name, tokenizer, padding),
            *unknown_tokens(name, tokenizer, samples, encoded),
            *vocabulary_finding(tokenizer, vocab_size),
        )
        self._vocab_size = vocab_size
        self._belongs = f"the tokenizer, with {len(tokenizer)} entries, does not belong to this checkpoint"
        self.n_tokens = round(self._size / self._chars_per_token)  # an estimate
        self.bos = self._encoder.bos

    def rows(self, seq_len: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[str, ...]]:
        """Up to `count` distinct sequences, (n_seq, seq_len) int64, spread over the text and in its order.

        Documents' starts are preferred, then paragraphs'; a short document's sequence runs on into the next. Where
        nothing stands before a sequence (no BOS), those of a running text begin at any word, as in training.
        Returns the rows and notes for the report. Raises CalibrationError on ids outside the vocabulary.
        """
        chars = max(1, math.ceil(seq_len * self._chars_per_token))
        # The nearer a start is sought, the less text is passed over, and the less good a start it may be.
        starts: list[Start] = [partial(next_start, reach=reach) for reach in (8 * chars, chars)]
        if len(self._documents) >= count:
            starts.insert(0, partial(next_start, reach=None))
        elif not self._encoder.prefix:
            starts = [next_word]
        best: list[list[int]] = []
        for start in starts:
            found = self._pack(seq_len, count, start, rng)
            if len(found) >= count:
                best = [found[index] for index in spread_indices(len(found), count, rng)]
                break
            best = max(best, found, key=len)
        rows = np.array(best, dtype=np.int64).reshape(len(best), seq_len)
        check_ids(
            rows,
            self._vocab_size,
            lambda index: f"position {index[1]} of calibration sequence {index[0]}",
            f"{self._belongs}: put the right tokenizer.json beside the weights, or pass token ids as "
            "--data FILE.npy or FILE.bin",
        )
        return rows, self._notes()

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.bos is None:
            notes.append(
                "the tokenizer has no BOS token, so sequences start without one, anywhere in the text"
            )
        if not self._encoder.joiner and len(self._documents) > 1:
            notes.append(
                "the tokenizer has no EOS or BOS token, so documents follow each other without a mark"
            )
        return tuple(notes)

    def _pack(self, seq_len: int, count: int, next_place: Start, rng: np.random.Generator) -> list[list[int]]:
        """Up to `count` distinct, non-overlapping sequences in text order, spread over a long enough text."""
        count = min(count, self._size + 1)  # no text has more sequences than characters
        need = seq_len * self._chars_per_token * _WAIT
        stride = self._size / count
        ample = stride >= 2.5 * need
        jitter = rng.random(count) * (stride - 2 * need)
        found: dict[tuple[int, ...], None] = {}
        place: Place = (0, 0)
        for _ in range(8 * count + 64):  # text that repeats itself must not be gone through without end
            if ample:
                if len(found) == count:
                    break
                place = max(place, self._locate(len(found) * stride + jitter[len(found)]))
            start = next_place(self._documents, place)
            cut = self._cut(start, seq_len) if start is not None else None
            if cut is None:
                break
            ids, place = cut
            found[ids] = None
        return [list(ids) for ids in found]

    def _cut(self, start: Place, seq_len: int) -> tuple[tuple[int, ...], Place] | None:
        """The sequence that begins at `start`, and the place where it ends; None if the text is too short."""
        ids = list(self._encoder.prefix)
        document, position = start
        while len(ids) < seq_len:
            piece, position = self._take(document, position, seq_len - len(ids))
            ids += piece
            if len(ids) < seq_len:
                if document + 1 == len(self._documents):
                    return None
                ids += self._encoder.joiner
                document, position = document + 1, 0
        return tuple(ids[:seq_len]), (document, position)

    def _take(self, document: int, position: int, need: int) -> tuple[list[int], int]:
        """At most `need` ids of a document from `position` on, and the position after them."""
        text = self._documents[document]
        width = math.ceil(1.5 * (need + _MARGIN) * self._chars_per_token) + 16
        while True:
            ids, ends = self._encoder.encode(text[position : position + width])
            whole = position + width >= len(text)
            if whole and len(ids) <= need:
                return ids, len(text)
            if whole or len(ids) >= need + _MARGIN:
                return ids[:need], position + ends[need - 1]
            width *= 2

    def _locate(self, offset: float) -> Place:
        """The place of a character that is counted over all documents."""
        document = int(np.searchsorted(self._offsets, offset, side="right")) - 1
        document = min(document, len(self._documents) - 1)
        return document, int(offset - self._offsets[document])

    def _samples(self) -> list[str]:
        """Evenly spaced pieces of the text."""
        places = [self._locate(self._size * i / _SAMPLES) for i in range(_SAMPLES)]
        pieces = [self._documents[document][at : at + _SAMPLE_CHARS] for document, at in places]
        return [piece for piece in dict.fromkeys(pieces) if piece]


def _split_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], int]:
    """Split texts at written end-of-document marks (`</s>`, `<|endoftext|>`), strip them, and drop empty ones.

    They are cut at spelt-out padding (`<pad>`) too; how often it stood there comes second.
    """
    ends = {"<|endoftext|>", tokenizer.bos_token, tokenizer.eos_token}
    pads = {tokenizer.pad_token} - ends - {tokenizer.unk_token}
    # A mark as short as a letter or a line break, as toy tokenizers have, is text.
    spelt = sorted(mark for mark in ends | pads if mark and len(mark) >= 3 and not re.search(r"\s", mark))
    mark = re.compile("|".join(re.escape(piece) for piece in spelt))
    stripped = (piece.strip() for text in texts for piece in mark.split(text))
    padding = sum(text.count(pad) for pad in pads if pad in spelt for text in texts)
    return [piece for piece in stripped if piece], padding


def _padding_finding(name: str, tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[Finding, ...]:
    if not count:
        return ()
    message = (
        f"the text of {name} spells out {count:,} pad tokens ({tokenizer.pad_token!r}), which were left out: neither "
        "run, nor scored, nor counted"
    )
    return (Finding("padding", message),)
