"""What a layer gains by its own repair, trained on or rescaled end to end, beyond what the others gain by theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peelcli.records import Reference, Run, Score
from peelcli.verdict.distance_from_init import relative_travel, young_parts
from peelcli.verdict.evidence import is_usable, own_bits, shared_rows
from peelcli.verdict.policy import Policy
from peelcli.verdict.statistics import Interval, holm_of, p_greater, paired_interval
from peelcli.verdict.weight_norms import most_unlike, relative_size


@dataclass(frozen=True)
class Gain:
    """How much more a layer gains by being trained on, or rescaled, than the other layers do, paired by sequence."""

    score: Score
    gap: Interval  # what it gains itself: to be better than it was is the proof, to gain more only the blame
    interval: Interval
    threshold: float
    usual: float  # the others' median gain, or of a rescale the most that another gains
    size: float  # of its weights beside the others': see `size`
    p_value: float
    travel: float | None = None  # of a layer whose vectors lag behind the others': see `travel`

    @property
    def stands_out(self) -> bool:
        """Whether both intervals that are shown say so; the decision takes the p-value too."""
        return self.gap.low > 0.0 and self.interval.low > self.threshold


def challenge_excess(run: Run, policy: Policy) -> dict[int, Gain]:
    """The excess of every layer's challenge over those of the layers of no fewer bits, where there are two at least.

    Free weights gain more than those that are kept to a grid (measured: .015 against .000 in a ternary model). The more
    a layer's weights are like the others' in size, the more it must gain, up to twice what those do: a fault's
    neighbours rise with it, and their weights are like those of the sound layers. One that has hardly been moved need
    only gain more than they do.
    """
    scores = [s for s in run.scores_of("challenge") if is_usable(s)]
    gains = {s.reference.layer: np.subtract(run.nll_eval, s.nll_eval) for s in scores}
    drops = {
        s.reference.layer: _added(run, s)
        for s in run.scores
        if s.reference == Reference("identity", s.reference.layer, s.reference.layer) and is_usable(s)
    }
    young = young_parts(run, policy)
    found = {}
    for score in scores:
        layer = score.reference.layer
        bits = own_bits(run, layer)
        others = [
            g for n, g in gains.items() if n != layer and own_bits(run, n) > bits - policy.same_precision_bits
        ]
        if len(others) < 2:
            continue
        usual = float(np.median([g.mean() for g in others]))
        excess = gains[layer] - np.median(others, axis=0)  # (n_seq,)
        threshold = max(policy.challenge_floor, policy.challenge_worth * drops.get(layer, 0.0))
        size = most_unlike(run, layer)
        likeness = max(0.0, 1.0 - abs(size) / policy.unlike_size)
        threshold = max(threshold, policy.challenge_share * likeness * usual)
        is_young = (layer, None) in young
        if is_young:
            threshold = min(threshold, policy.young_floor)
        found[layer] = Gain(
            score,
            paired_interval(gains[layer].tolist(), policy.confidence),
            paired_interval(excess.tolist(), policy.confidence),
            threshold,
            usual,
            size,
            max(p_greater(excess.tolist(), threshold), p_greater(gains[layer].tolist())),
            relative_travel(run, layer, None) if is_young else None,
        )
    return found


def standing_out(excess: Mapping[int, Gain], policy: Policy) -> dict[int, Gain]:
    """The challenges that gain more than the others beyond chance, all layers tested together."""
    rejected = holm_of({n: x.p_value for n, x in excess.items()}, 1.0 - policy.confidence)
    return {n: x for n, x in excess.items() if rejected[n] and x.stands_out}


def peak_of(excess: Mapping[int, Gain]) -> int:
    """The layer that gains most of all by being trained on; 0 where none was."""
    return max(excess, key=lambda n: excess[n].gap.mean, default=0)


def most_trained(
    excess: Mapping[int, Gain], standing: Mapping[int, Gain], known: Mapping[int, float], policy: Policy
) -> dict[int, Gain]:
    """The layers to blame for what they gain by being trained on: the peak, where it stands out.

    A fault's neighbours can repair part of it and rise with it, so that others that stand out are not blamed; but of
    the layers that have hardly been moved the peak is, too. Where something surpasses in another layer, that is proof
    without any training, and comes first: the peak is blamed beside it only where its weights are unlike the others'
    and it gains far more, for a layer behind a wreck does better dropped. What else matches is no reason against it.
    standing: those that stand out. known: what something else gains in each layer that it surpasses.
    """
    young = {n: x for n, x in standing.items() if x.travel is not None}
    found = {n: standing[n] for n in (peak_of(excess), peak_of(young)) if n in standing}

    def is_beyond(layer: int, x: Gain) -> bool:
        rival = max((gain for n, gain in known.items() if n != layer), default=0.0)
        is_unlike = abs(x.size) >= policy.unlike_size or x.travel is not None
        return is_unlike and x.gap.low > policy.wreck_factor * rival

    return {n: x for n, x in found.items() if not known or is_beyond(n, x)}


def _added(run: Run, score: Score) -> float:
    """What a reference adds to the loss, where it was measured."""
    return float(np.mean(score.nll_eval) - np.mean(score.beside(run.nll_eval)))


Part = tuple[int, str | None]  # a layer and its sublayer, None for the block


def rescale_excess(run: Run, policy: Policy) -> dict[Part, Gain]:
    """The excess of every part's rescale over so many times the best of the other layers', where there are two."""
    scores = {(s.reference.layer, s.reference.sublayer): s for s in run.scores_of("rescale") if is_usable(s)}
    gains = {part: np.subtract(s.beside(run.nll_eval), s.nll_eval) for part, s in scores.items()}
    drops = {
        (s.reference.layer, s.reference.sublayer): _added(run, s)
        for s in run.scores_of("identity")
        if s.reference.target == s.reference.layer and is_usable(s)
    }
    found = {}
    for (layer, part), score in scores.items():
        gain = gains[layer, part]
        others = [other for other in scores if other[0] != layer and other[1] == part]
        if len(others) < 2:
            continue
        second = max(others, key=lambda other: float(gains[other].mean()))
        usual = max(0.0, float(gains[second].mean()))
        mine, theirs = shared_rows(len(run.nll_eval), score, scores[second])
        excess = gain[mine] - (policy.rescale_factor * gains[second][theirs] if usual > 0 else 0.0)
        # A part of a layer that does most of the work gains more, too.
        worth = max(drops.get((layer, p), 0.0) for p in (None, part))
        threshold = max(policy.rescale_floor, policy.rescale_worth * worth)
        # Below the threshold no chance is at stake: it does not matter.
        matters = float(gain.mean()) > threshold
        found[layer, part] = Gain(
            score,
            paired_interval(gain.tolist(), policy.confidence),
            paired_interval(excess.tolist(), policy.confidence),
            0.0,
            usual,
            relative_size(run, layer, part),
            max(p_greater(excess.tolist()), p_greater(gain.tolist())) if matters else 1.0,
        )
    return found


def most_rescaled(rescales: Mapping[Part, Gain], alpha: float) -> dict[int, Gain]:
    """The layers that gain far more by other lengths of their matrices than any other layer does by its own."""
    rejected = holm_of({part: x.p_value for part, x in rescales.items()}, alpha)
    standing = {part: x for part, x in rescales.items() if rejected[part] and x.stands_out}
    layers = dict.fromkeys(n for n, _ in standing)
    return {n: _narrowest([x for (m, _), x in standing.items() if m == n]) for n in layers}


def best_rescale(rescales: Mapping[Part, Gain], layer: int) -> Gain | None:
    """What does most for a layer, whether that is more than chance or not."""
    mine = [x for (n, _), x in rescales.items() if n == layer]
    return max(mine, key=lambda x: x.gap.mean, default=None)


def _narrowest(rescales: Sequence[Gain]) -> Gain:
    """Of the rescales of one layer that stand out the best sublayer's, where it does as much as the whole block's."""
    whole = next((x for x in rescales if x.score.reference.sublayer is None), None)
    parts = [x for x in rescales if x is not whole and (whole is None or x.gap.mean >= whole.gap.low)]
    return max(parts or rescales, key=lambda x: x.gap.mean)
