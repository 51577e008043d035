"""Which references a part of `eval` settles: most cost so much that no more tokens could make them decide anything.

A reference flags a layer where it costs a small share of what the same kind costs other layers, or less than nothing.
One that a part of the sequences shows to be far from either stays measured on that part alone; every other is measured
on all of `select` and `eval`, and what is decided is decided by that: the choice inflates no error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_low

import numpy as np

from peelcli.records import Reference, Score
from peelcli.verdict.evidence import even_share, group_of
from peelcli.verdict.policy import Policy

# Each layer's challenge and rollback are set beside those of all others, whatever they gain.
SCREENED = ("identity", "direct", "span", "exchange", "rescale")
SURE = 4.0  # standard errors of the part
FAR = 0.5  # of what the same costs other layers: margins are less than a third of that


def settled(
    scores: Sequence[Score], nll_eval: Sequence[float], unigram_ce: float, num_layers: int, policy: Policy
) -> set[str]:
    """The keys of the references that need not be measured any further.

    scores: as measured on the part. nll_eval: the run's own losses on all of `eval`.
    """
    least = policy.least_share * even_share(nll_eval, unigram_ce, num_layers)  # a usual cost, at least
    lowest, mean, kl = {}, {}, {}  # by reference; the lowest that cost and divergence can be
    for s in scores:
        cost = np.subtract(s.nll_eval, s.beside(nll_eval))
        lowest[s.reference] = (_low(cost), _low(np.asarray(s.kl_eval)))
        mean[s.reference] = float(cost.mean())
        kl[s.reference] = float(np.mean(s.kl_eval))
    groups: dict[tuple[object, ...], list[Reference]] = {}
    for s in scores:
        groups.setdefault(group_of(s), []).append(s.reference)
    found: set[str] = set()
    for group in groups.values():
        if group[0].kind == "exchange":
            found |= {r.key for r in group if lowest[r][0] > -policy.surpassed_floor}
        elif group[0].kind == "rescale":  # each layer's is set beside the others'
            if all(lowest[r][0] > -policy.rescale_floor for r in group):
                found |= {r.key for r in group}
        else:
            found |= {r.key for r in group if _is_far(r, group, lowest, mean, kl, least)}
    return found


def _is_far(
    reference: Reference,
    group: Sequence[Reference],
    lowest: Mapping[Reference, tuple[float, float]],
    mean: Mapping[Reference, float],
    kl: Mapping[Reference, float],
    least: float,
) -> bool:
    """Whether it costs a good share of what its peers at other layers do, by the loss and by the predictions."""
    others = [r for r in group if r.layer != reference.layer]
    if len(others) < 2:
        return False
    cost, divergence = lowest[reference]
    usual = max(least, median_low([mean[r] for r in others]))
    return cost > FAR * usual and divergence > FAR * median_low([kl[r] for r in others])


def _low(values: np.ndarray) -> float:
    return float(values.mean() - SURE * values.std(ddof=1) / len(values) ** 0.5)
