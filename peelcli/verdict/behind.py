"""Which layers something was found in because of another's fault: they are left undecided until that one is mended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from peelcli.verdict.evidence import STATE_KINDS, Evidence
from peelcli.verdict.excess import Excess
from peelcli.verdict.policy import Policy


def behind_another(
    surpassed: Mapping[int, Evidence],
    matched: Collection[int],
    challenged: Collection[int],
    excess: Mapping[int, Excess],
    worth_of: Callable[[int], float],
    policy: Policy,
) -> dict[int, int]:
    """Layers that something was found in because another is hurt far more, and that one.

    Two in the wrong order spoil the inputs of all, any other those of the layers after it: what does better there, or
    does as well where the harm is more than a layer is worth, tells of them. Trained alone a layer may mend far more
    than the best reference does better by; then it is what the layers before it do without it that is spoiled, too.
    challenged: the layer that gains most by training, where it explains what surpasses elsewhere (`most_trained`).
    excess: of the challenges, where they count. worth_of: what dropping another layer costs, nats per token.
    """
    if not surpassed:
        return {}
    told = {n: e for n, e in surpassed.items() if _tells_of_states(e)}
    by_challenge = {n: next(iter(challenged)) for n in told if challenged and n not in challenged}
    if by_challenge:
        return by_challenge
    best = max(surpassed.values(), key=lambda e: e.gap.mean)
    hurt = best.score.reference.layer  # of two in the wrong order the first
    found = {n: hurt for n, e in told.items() if _is_spoiled(n, e, best, policy)}
    found |= {n: hurt for n in matched if n > hurt and best.gap.low > policy.wreck_factor * worth_of(n)}
    trained = {n: x for n, x in excess.items() if n in surpassed}
    if trained:
        hurt = max(trained, key=lambda n: trained[n].gap.mean)
        least = trained[hurt].gap.low
        for n, e in told.items():
            mends_less = n not in trained or trained[n].gap.mean < least
            if n != hurt and mends_less and least > policy.wreck_factor * e.gap.mean:
                found.setdefault(n, hurt)
    return {n: hurt for n, hurt in found.items() if hurt not in found}


def _is_spoiled(layer: int, e: Evidence, best: Evidence, policy: Policy) -> bool:
    is_after = layer > best.score.reference.layer or best.score.reference.kind == "exchange"
    return is_after and best.gap.low > policy.wreck_factor * e.gap.mean


def _tells_of_states(e: Evidence) -> bool:
    return e.score.reference.kind in STATE_KINDS
