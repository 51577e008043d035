"""A network whose blocks together do harm: one of them is wrecked, and the others carry the wreck on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from peelcli.records import LayerVerdict, Run, Score
from peelcli.verdict import attributed, words
from peelcli.verdict.end_to_end_gains import Gain
from peelcli.verdict.evidence import is_usable, shared_rows
from peelcli.verdict.policy import Policy
from peelcli.verdict.statistics import p_greater, paired_interval


def judge_damaged(
    run: Run, policy: Policy, excess: Mapping[int, Gain], facts_of: Callable[[int], words.Facts]
) -> list[LayerVerdict]:
    """Where one layer is wrecked, what drops or fits another measures the wreck: the challenge alone tells which."""
    by_itself = _blamed(run, policy, excess)
    blamed = by_itself or _first_to_harm(run, policy, excess)
    gains = {n: x.gap.mean for n, x in excess.items()}
    out = []
    for layer in run.layers:
        others = max((gain for n, gain in gains.items() if n != layer), default=0.0)
        score = gains[layer] / others if layer in gains and others > 0 else None
        if score is not None:
            score = max(score, 1.0) if layer == blamed else min(score, policy.found_score)
        facts = replace(facts_of(layer), score=score)
        if layer == blamed:
            verdict = words.challenged(layer, excess[layer], facts)
            out.append(verdict if by_itself else words.at_the_turn(verdict))
        else:
            out.append(attributed.behind_a_wreck(layer, blamed, facts))
    return out


def _blamed(run: Run, policy: Policy, excess: Mapping[int, Gain]) -> int:
    """The wrecked layer, or 0 where nothing tells which it is: by its repair, or by the size of its weights.

    What is mended best is not always what is wrecked: where a first layer holds new weights, which are small and do
    little, the second takes its place as readily as it learns itself (measured: .94 nats against .47).
    """
    if len(excess) < 2:
        return 0
    return _best_repair(run, policy, [x.score for x in excess.values()]) or _unlike(policy, excess)


def _first_to_harm(run: Run, policy: Policy, excess: Mapping[int, Gain]) -> int:
    """The layer at the turning point, if its repair mends the network; else 0."""
    layer = _turning_point(run, policy)
    return layer if layer in excess and _mends(run, policy, excess[layer].score) else 0


def _turning_point(run: Run, policy: Policy) -> int:
    """The first block behind which the network's own head reads the text clearly worse than before it; 0 where none is.

    Up to there the states are sound. In sound networks each block lowers that loss (measured: small ones of every kind,
    from 4.2 to 5.9 nats down to 2.8 to 3.3), and the one that is wrecked raises it, whatever those behind it do.
    """
    until = {
        s.reference.layer - 1: s
        for s in run.scores_of("identity")
        if (s.reference.target, s.reference.sublayer) == (run.num_layers, None) and is_usable(s)
    }
    for layer in range(1, run.num_layers + 1):
        before, after = until.get(layer - 1), until.get(layer)
        if before is None or (after is None and layer < run.num_layers):
            return 0
        if after is None:
            rise = np.subtract(before.beside(run.nll_eval), before.nll_eval)
        else:
            first, second = shared_rows(len(run.nll_eval), before, after)
            rise = np.subtract(after.nll_eval[second], before.nll_eval[first])
        if paired_interval(rise.tolist(), policy.confidence).low > policy.untrained_gap:
            return layer
    return 0


def _unlike(policy: Policy, excess: Mapping[int, Gain]) -> int:
    """The layer whose weights alone are of quite another size, where it gains by being trained."""
    first, second = sorted(excess, key=lambda n: -abs(excess[n].size))[:2]
    size, next_size = abs(excess[first].size), abs(excess[second].size)
    is_alone = size > policy.wreck_size and size > policy.wreck_unlike * next_size
    return first if is_alone and excess[first].gap.low > policy.untrained_gap else 0


def _best_repair(run: Run, policy: Policy, challenges: Sequence[Score]) -> int:
    """The layer whose repair gains clearly more than that of any other, and mends the network; 0 where there is none.

    Chosen on `select`. On `eval` it must lead by more than a little, and bring the loss below that of token
    frequencies, which no adaptation to a text that makes no sense to a sound network could do.
    """
    best = min(challenges, key=lambda s: float(np.mean(s.nll_select)))
    gain = np.subtract(run.nll_eval, best.nll_eval)
    leads = [
        gain - policy.wreck_lead * np.subtract(run.nll_eval, s.nll_eval) for s in challenges if s is not best
    ]
    is_ahead = all(p_greater(lead.tolist()) < 1.0 - policy.confidence for lead in leads)
    return best.reference.layer if is_ahead and _mends(run, policy, best) else 0


def _mends(run: Run, policy: Policy, score: Score) -> bool:
    """Whether with it the network does clearly better than token frequencies."""
    return paired_interval(score.nll_eval, policy.confidence).high < run.unigram_ce - policy.untrained_gap
