"""Losses of a network's predictions, sequence by sequence."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def token_losses(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean NLL of each sequence (n_seq,), and log-probabilities (n_seq, seq_len−1, vocab)."""
    log_p = logits[:, :-1].float().log_softmax(-1)
    target = ids[:, 1:, None].to(log_p.device)
    return -log_p.gather(-1, target)[..., 0].double().mean(1), log_p


def predictive_entropy(log_p: Tensor) -> Tensor:
    """Mean entropy of each sequence's predictions (n_seq,) from log-probabilities (n_seq, seq_len−1, vocab)."""
    return -(log_p.exp() * log_p).sum(-1).double().mean(1)


def unigram_ce(fit: np.ndarray, evaluation: np.ndarray, vocab_size: int) -> float:
    """CE, in nats per token, on `evaluation` of the token frequencies of `fit` (add-one smoothed).

    Never above ln(vocab_size): where `fit` is too short to know the frequencies, not to use them does better.
    """
    counts = np.bincount(fit[:, 1:].ravel(), minlength=vocab_size) + 1.0
    return min(float(-np.log(counts / counts.sum())[evaluation[:, 1:]].mean()), float(np.log(vocab_size)))
