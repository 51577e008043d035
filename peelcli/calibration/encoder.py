"""Encode text: the ids that begin a sequence, and how many characters each token covers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from peelcli.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """Wraps the checkpoint's tokenizer.

    `prefix` holds the ids that open a sequence: what the tokenizer itself puts first, and its BOS where it
    has one but does not add it. (Where BOS and EOS are one token, as in GPT-2, it stood before every document
    of the training stream but the first, so it opens a sequence as well.)

    `joiner` holds the ids between two documents of one sequence: what the tokenizer itself puts there when it
    encodes them one by one; where it adds nothing, EOS, else BOS, else none. A tokenizer that adds BOS says
    that training had it; an EOS that it does not add, the model may never have seen (on a Llama trained on
    BOS-separated stories, joining with EOS cost 0.3 nats per token over joining with BOS).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sample: str) -> None:
        """sample: some of the text that will be encoded.

        Raises CalibrationError where the tokenizer makes nothing of it.
        """
        self._tokenizer = tokenizer
        self._offsets = bool(getattr(tokenizer, "is_fast", False))
        plain = self.encode(sample)[0]
        if not plain:
            raise CalibrationError(
                f"the checkpoint's tokenizer ({len(tokenizer)} entries) turns the calibration text into no tokens at "
                "all, expected some; pass text in the model's language with --data, copy tokenizer.json again if it "
                "is not the model's own, or pass token ids as --data FILE.npy or FILE.bin"
            )
        full = list(tokenizer(sample, add_special_tokens=True, verbose=False)["input_ids"])
        before = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
        prefix, suffix = ([], []) if before is None else (full[:before], full[before + len(plain) :])
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        apart = [mark for mark in (eos, bos) if mark is not None][:1]
        self.bos: int | None = bos
        self.prefix: list[int] = prefix if bos is None or bos in prefix else [bos, *prefix]
        self.joiner: list[int] = suffix + prefix or apart

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of `text` without special tokens, and the number of characters consumed after each of them.

        A tokenizer without offsets counts all of `text` as used up by each: wasteful, but never overlapping.
        """
        try:
            encoded = self._tokenizer(
                text,
                add_special_tokens=False,
                return_offsets_mapping=self._offsets,
                verbose=False,  # else transformers warns that the piece is longer than the model's context
            )
        except Exception as error:  # noqa: BLE001  # the tokenizers library raises bare Exception
            raise CalibrationError(
                f"the checkpoint's tokenizer fails on the calibration text ({error}); pass text in the model's "
                "language with --data, or token ids as --data FILE.npy or FILE.bin"
            ) from error
        ids = list(encoded["input_ids"])
        ends = [end for _, end in encoded["offset_mapping"]] if self._offsets else []
        if not any(ends):  # no offsets, or a tokenizer that reports none
            return ids, [len(text)] * len(ids)
        return ids, [int(end) for end in np.maximum.accumulate(ends)]
