"""Which findings another layer's fault explains: that layer is named, and the finding is decided once it is mended.

This is the one way in which a finding loses its flag. What explains it is flagged itself, gains more, and is named in
the reason beside the finding. A match explains nothing: that one layer is idle is no reason why another gains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from peelcli.verdict.end_to_end_gains import Gain
from peelcli.verdict.evidence import STATE_KINDS, Evidence
from peelcli.verdict.policy import Policy

Finding = Evidence | Gain


@dataclass(frozen=True)
class Behind:
    """What was found in a layer, and the layer whose fault explains it.

    is_flagged: False where that layer is no more than the one that gains most by training: then neither is blamed.
    """

    hurt: int
    finding: Finding
    is_flagged: bool = True


def in_wrong_order(
    proven: Sequence[Evidence], others: Mapping[int, Evidence]
) -> tuple[dict[int, Evidence], dict[int, Behind]]:
    """Pairs that do better in each other's place, the best first, each layer once; and what explains the other pairs.

    Where something else does better still, in these or in other layers, the fault is there: a layer behind another that
    is hurt may do less harm in another place.
    """
    rival = max(others, key=lambda n: others[n].gap_select, default=0)
    found: dict[int, Evidence] = {}
    behind: dict[int, Behind] = {}
    exchanges = [e for e in proven if e.score.reference.is_exchange]
    for e in sorted(exchanges, key=lambda e: e.gap_select, reverse=True):
        pair = (e.score.reference.layer, e.score.reference.target)
        taken = next((n for n in pair if n in found), 0)
        stronger = rival if rival and others[rival].gap_select >= e.gap_select else taken
        if stronger:
            behind |= {n: Behind(stronger, e) for n in pair if n not in behind}
        else:
            found |= dict.fromkeys(pair, e)
    return found, {n: b for n, b in behind.items() if n not in found}


def is_downstream(
    surpassed: Mapping[int, Evidence],
    matched: Mapping[int, Evidence],
    challenged: Mapping[int, Gain],
    excess: Mapping[int, Gain],
    worth_of: Callable[[int], float],
    policy: Policy,
) -> dict[int, Behind]:
    """Layers that something was found in because another is hurt far more.

    Two layers in the wrong order spoil the inputs of all, any other layer those of the layers after it: a reference
    that does better there, or as well where the harm is more than a layer is worth, measures that fault. Trained alone
    a layer may mend far more than the best reference does better by; then it spoils the layers before it, too.
    challenged: the layers that gain most by training, if their fault explains the other findings (`most_trained`).
    excess: of the challenges, where they count. worth_of: what dropping another layer costs, nats per token.
    """
    if not surpassed:
        return {}
    found = _hurt_by_whom(surpassed, matched, challenged, excess, worth_of, policy)
    findings = {**matched, **surpassed}
    return {n: Behind(hurt, findings[n]) for n, hurt in found.items() if hurt not in found}


def _hurt_by_whom(
    surpassed: Mapping[int, Evidence],
    matched: Collection[int],
    challenged: Mapping[int, Gain],
    excess: Mapping[int, Gain],
    worth_of: Callable[[int], float],
    policy: Policy,
) -> dict[int, int]:
    of_states = {n: e for n, e in surpassed.items() if e.score.reference.kind in STATE_KINDS}
    if challenged:
        most = max(challenged, key=lambda n: challenged[n].gap.mean)
        by_challenge = {n: most for n in of_states if n not in challenged}
        if by_challenge:
            return by_challenge
    best = max(surpassed.values(), key=lambda e: e.gap.mean)
    hurt = best.score.reference.layer  # of two in the wrong order the first
    found = {n: hurt for n, e in of_states.items() if _is_spoiled(n, e, best, policy)}
    found |= {n: hurt for n in matched if n > hurt and best.gap.low > policy.wreck_factor * worth_of(n)}
    trained = {n: x for n, x in excess.items() if n in surpassed}
    if trained:
        hurt = max(trained, key=lambda n: trained[n].gap.mean)
        least = trained[hurt].gap.low
        for n, e in of_states.items():
            mends_less = n not in trained or trained[n].gap.mean < least
            if n != hurt and mends_less and least > policy.wreck_factor * e.gap.mean:
                found.setdefault(n, hurt)
    return found


def _is_spoiled(layer: int, e: Evidence, best: Evidence, policy: Policy) -> bool:
    is_after = layer > best.score.reference.layer or best.score.reference.is_exchange
    return is_after and best.gap.low > policy.wreck_factor * e.gap.mean


def strongest(findings: Mapping[int, Finding], layer: int) -> int:
    """The layer other than `layer` whose finding gains most for sure; 0 where there is none."""
    return max((n for n in findings if n != layer), key=lambda n: findings[n].gap.low, default=0)


def explains(other: Finding, finding: Finding, policy: Policy) -> bool:
    """Whether another layer's finding gains so much more that this one may be an effect of that fault."""
    return other.gap.low > policy.wreck_factor * finding.gap.mean


def part_challenges(
    standing: Mapping[int, Gain],
    challenged: Mapping[int, Gain],
    surpassed: Mapping[int, Evidence],
    matched: Collection[int],
    peak: int,
    policy: Policy,
) -> tuple[dict[int, Gain], dict[int, Behind]]:
    """The challenges that convict their layers, and those that another layer explains.

    A fault's neighbours can repair part of it and rise with it: beside a stronger finding a challenge that stands out
    may be an effect of that. A challenge of an idle layer convicts it all the same, unless the other is far stronger.
    standing: the challenges that stand out. challenged: those that convict by themselves (`most_trained`). surpassed:
    by another reference, and not behind another layer. peak: the layer that gains most of all by training.
    """
    found: dict[int, Finding] = {**surpassed, **challenged}
    convicted, behind = dict(challenged), {}
    for n, x in standing.items():
        if n in found:
            continue
        other = strongest(found, n)
        if n in matched and not (other and explains(found[other], x, policy)):
            convicted[n] = x
        else:
            behind[n] = Behind(other, x) if other else Behind(peak, x, is_flagged=False)
    return convicted, behind


def part_rescales(
    rescaled: Mapping[int, Gain], found: Mapping[int, Finding], policy: Policy
) -> tuple[dict[int, Gain], dict[int, Behind]]:
    """The rescales that convict their layers, and those that a far stronger finding in another layer explains."""
    every: dict[int, Finding] = {**rescaled, **found}
    convicted, behind = {}, {}
    for n, x in rescaled.items():
        other = strongest(every, n)
        if other and explains(every[other], x, policy):
            behind[n] = Behind(other, x)
        else:
            convicted[n] = x
    return convicted, behind
