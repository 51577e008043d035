"""Whether the text fits the network, and whether the network has learned anything or is damaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peelcli.records import Reference, Run, Score
from peelcli.verdict.policy import Policy
from peelcli.verdict.statistics import paired_interval


def stack_of(run: Run) -> Score | None:
    """The reference that drops every block at once, where it was measured."""
    whole = Reference("identity", 1, run.num_layers)
    return next((s for s in run.scores if s.reference == whole and run.num_layers > 1), None)


def blocks_do_harm(
    nll: Sequence[float], nll_without: Sequence[float], unigram_ce: float, policy: Policy
) -> bool:
    """Whether the loss is worse than that of token frequencies and clearly falls when every block is dropped.

    Text that is foreign to a sound network does not look like that: without its blocks it does far worse still
    (measured: by .6 and 1.4 nats in small models, 19 on Shakespeare in a real one). Where the weights of one block make
    no sense to those behind it they are surely wrong together (by .3 to 1.5 nats).
    """
    change = paired_interval(np.subtract(nll_without, nll).tolist(), policy.confidence)
    return change.high < -policy.untrained_gap and not does_better_than(unigram_ce, nll, policy)


def does_better_than(unigram_ce: float, nll: Sequence[float], policy: Policy) -> bool:
    """Whether the losses are clearly below that of token frequencies."""
    return float(np.mean(nll)) <= unigram_ce - policy.untrained_gap


def is_damaged(run: Run, policy: Policy) -> bool:
    """Whether the blocks of the network together do harm: one or more of them are wrecked."""
    stack = stack_of(run)
    if stack is None or len(run.nll_eval) < policy.min_sequences or not np.isfinite(stack.nll_eval).all():
        return False
    return blocks_do_harm(run.nll_eval, stack.nll_eval, run.unigram_ce, policy)


def data_fit(nll: Sequence[float], entropy: Sequence[float], gap: float = Policy.foreign_gap) -> str:
    """`own` or `foreign`: whether the loss on the text is near the uncertainty that the model itself expresses.

    A model is calibrated on text like that it was trained on: its loss there is about the mean entropy of its own
    predictions on the same contexts (measured on a real 5-layer model: 0.4 nats apart on its own kind of text, 2.9 on
    Shakespeare, 3.1 on Python's documentation). It costs nothing beside the loss; sampling would cost a pass a token.
    """
    return "foreign" if mismatch(nll, entropy) > gap else "own"


def mismatch(nll: Sequence[float], entropy: Sequence[float]) -> float:
    """Mean loss less mean predictive entropy, in nats per token; near 0 where the model is calibrated."""
    return float(np.mean(nll) - np.mean(entropy))


def losses_are_finite(run: Run) -> bool:
    """Whether the trained model's own losses are: what every gap is taken from."""
    return bool(np.isfinite([*run.nll_select, *run.nll_eval]).all())


def is_untrained(run: Run, policy: Policy) -> bool:
    """Whether the blocks together contribute nothing and the loss is no better than that of token frequencies.

    Where the repair of one layer alone makes it better than that, the others have learned: one layer is hurt.
    """
    stack = (
        stack_of(run)
        if run.num_layers > 1
        else next((s for s in run.scores if s.reference == Reference("identity", 1, 1)), None)
    )
    if stack is None or len(run.nll_eval) < policy.min_sequences or not np.isfinite(stack.nll_eval).all():
        return False
    cost = paired_interval(np.subtract(stack.nll_eval, run.nll_eval).tolist(), policy.confidence)
    if blocks_do_harm(run.nll_eval, stack.nll_eval, run.unigram_ce, policy):
        return False
    # The bit-width sweep and settled references are measured on a part of `eval` only.
    whole = [s for s in run.scores if len(s.nll_eval) == len(run.nll_eval)]
    repaired = [float(np.mean(s.nll_eval)) for s in whole if s.reference.kind != "rollback"]
    least = min((ce for ce in repaired if np.isfinite(ce)), default=np.inf)
    return bool(
        cost.high < policy.untrained_gap
        and not does_better_than(run.unigram_ce, run.nll_eval, policy)
        and least > run.unigram_ce - policy.untrained_repair * policy.untrained_gap
    )
