"""Which layers something was found in because of another's fault: they are left undecided until that one is mended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from peelcli.verdict.evidence import STATE_KINDS, Evidence
from peelcli.verdict.excess import Excess
from peelcli.verdict.policy import Policy


def behind_another(
    surpassed: Mapping[int, Evidence],
    matched: Collection[int],
    excess: Mapping[int, Excess],
    worth_of: Callable[[int], float],
    policy: Policy,
) -> dict[int, int]:
    """Layers that something was found in because another is hurt far more, and that one.

    Two in the wrong order spoil the inputs of all, any other those of the layers after it: what does better there, or
    does as well where the harm is more than a layer is worth, tells of them. Trained alone a layer may mend far more
    than the best reference does better by; then it is what the layers before it do without it that is spoiled, too.
    excess: of the challenges, where they count. worth_of: what dropping another layer costs, nats per token.
    """
    found: dict[int, int] = {}
    for hurt, best in sorted(surpassed.items(), key=lambda item: item[1].gap.mean, reverse=True)[:1]:
        found |= {n: hurt for n, e in surpassed.items() if _is_spoiled(n, e, hurt, best, policy)}
        found |= {n: hurt for n in matched if n > hurt and best.gap.low > policy.wreck_factor * worth_of(n)}
    trained = {n: x for n, x in excess.items() if n in surpassed}
    if trained:
        hurt = max(trained, key=lambda n: trained[n].gap.mean)
        least = trained[hurt].gap.low
        for n, e in surpassed.items():
            mends_less = n not in trained or trained[n].gap.mean < least
            if n != hurt and _tells_of_states(e) and mends_less and least > policy.wreck_factor * e.gap.mean:
                found.setdefault(n, hurt)
    return {n: hurt for n, hurt in found.items() if hurt not in found}


def _is_spoiled(layer: int, e: Evidence, hurt: int, best: Evidence, policy: Policy) -> bool:
    is_after = layer > hurt or best.score.reference.kind == "exchange"
    return _tells_of_states(e) and is_after and best.gap.low > policy.wreck_factor * e.gap.mean


def _tells_of_states(e: Evidence) -> bool:
    return e.score.reference.kind in STATE_KINDS
