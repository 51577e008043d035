"""Calibration: text or token files → token ids (n_seq, seq_len), split into fit, select and eval.

Sequences begin as the model's training sequences did: at a document's or a paragraph's start, tokenised on
their own from there, with the tokenizer's special tokens. Windows cut mid-document shift the loss of a good
model by tenths of a nat and make every layer look improvable.
"""

from __future__ import annotations

from peelcli.calibration.build import Calibration, build_calibration
from peelcli.calibration.split import Split

__all__ = ["Calibration", "Split", "build_calibration"]
