"""Verdicts in words: the reason, with its figures, and what to do. One function a verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peelcli.records import Finding, LayerVerdict, Reference
from peelcli.statistics import Interval
from peelcli.verdict.evidence import Evidence, Excess

_PARTS = {None: "the block", "attention": "its attention", "mlp": "its MLP"}

IMPROVE = (
    "Compare the layer's weights with the run's earlier checkpoints and with the source of a conversion; then train on "
    "with a higher learning rate for it, or re-initialise it. `peel graft` writes the better weights in place."
)
UNUSED = (
    "Its capacity goes unused, which may be harmless. Check that it was not frozen or left at its initial weights; "
    "otherwise drop it, or store it in fewer bits."
)


@dataclass(frozen=True)
class Facts:
    """What every verdict of a layer carries, whatever it says."""

    own_bits: float | None = None
    effective_bits: float | None = None
    fvu: float | None = None
    drop_cost: float | None = None
    score: float | None = None
    foreign: bool = False


def stand_in(reference: Reference) -> str:
    """A reference in words, such as "its attention in ternary"."""
    part = _PARTS[reference.sublayer]
    if reference.kind == "identity":
        return f"{part} dropped" if reference.sublayer else "the block dropped"
    if reference.kind == "span":
        return f"one {reference.scheme} block for layers {reference.layer}-{reference.target}"
    if reference.kind == "challenge":
        return "the block trained on alone"
    return f"{part} in {reference.scheme}"


def _interval(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def _make(
    layer: int,
    verdict: str,
    reason: str,
    advice: str,
    facts: Facts,
    e: Evidence | None = None,
    blame: bool = False,
) -> LayerVerdict:
    sublayer = None
    if e is not None and blame:
        sublayer = e.score.reference.sublayer or "block"
    return LayerVerdict(
        layer=layer,
        verdict=verdict,
        reason=reason,
        advice=advice,
        score=facts.score,
        gap=e.gap.mean if e else None,
        gap_interval=_interval(e.gap) if e else None,
        reference=e.score.reference if e else None,
        sublayer=sublayer,
        effective_bits=facts.effective_bits,
        own_bits=facts.own_bits,
        fvu=facts.fvu,
        drop_cost=facts.drop_cost,
    )


def surpassed(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """A lighter or equal reference has the lower loss: proof."""
    r = e.score.reference
    reason = (
        f"With {stand_in(r)} the loss is {e.gap.mean:.4f} nats lower ({e.gap.low:+.4f} to {e.gap.high:+.4f}): "
        "proof that the layer could be better."
    )
    return _make(layer, "surpassed", reason, IMPROVE, facts, e, blame=True)


def challenged(layer: int, x: Excess, facts: Facts) -> LayerVerdict:
    """Training this layer alone gains far more than training any other."""
    gain = x.interval
    reason = (
        f"Trained on alone it gains {gain.mean:.4f} nats ({gain.low:+.4f} to {gain.high:+.4f}) more than the other layers, "
        f"which gain {x.usual:.4f} in the median: proof that the layer could be better."
    )
    return LayerVerdict(
        layer,
        "surpassed",
        reason,
        IMPROVE,
        score=facts.score,
        gap=gain.mean,
        gap_interval=_interval(gain),
        reference=x.score.reference,
        sublayer="block",
        effective_bits=facts.effective_bits,
        own_bits=facts.own_bits,
        fvu=facts.fvu,
        drop_cost=facts.drop_cost,
    )


def matched(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """A lighter reference is as good: capacity unused, no proof of harm."""
    what = "the predictions change by" if facts.foreign else "the loss rises by"
    reason = (
        f"With {stand_in(e.score.reference)} {what} {e.cost.mean:.4f} nats (at most {e.cost.high:.4f}), where the same "
        f"costs the other layers {e.usual:.4f} in the median."
    )
    verdict = _make(layer, "matched", reason, UNUSED, facts, e, blame=True)
    bits = [
        b
        for b in (facts.effective_bits, e.score.reference.bits if not e.score.reference.sublayer else None)
        if b is not None
    ]
    return replace(verdict, effective_bits=min(bits, default=None))


def untrained(layer: int, e: Evidence | None, facts: Facts) -> LayerVerdict:
    """The network as a whole is untrained: every layer is matched by its absence."""
    reason = (
        "The network without any of its blocks has the same loss: nothing in this layer has been learned."
    )
    advice = "Check that the weights were loaded into the checkpoint at all; then train."
    return _make(
        layer, "matched", reason, advice, replace(facts, effective_bits=0.0, score=1.0), e, blame=True
    )


def effective(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """Every reference costs clearly more than the margin."""
    reason = (
        f"Every reference costs clearly more than a match may; the closest, {stand_in(e.score.reference)}, costs "
        f"{e.cost.mean:.4f} nats."
    )
    return _make(layer, "effective", reason, "", facts, e)


def straddles(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """The interval holds both a match and a cost."""
    why = (
        f"with {stand_in(e.score.reference)} the cost is {e.cost.mean:.4f} nats ({e.cost.low:+.4f} to {e.cost.high:+.4f}), and "
        f"a match may cost {e.margin:.4f}"
    )
    return undecided(layer, why, "Use more tokens (--tokens).", facts, e)


def unsettled(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """The closest fit had not converged: more steps might have matched."""
    why = f"{stand_in(e.score.reference)} costs {e.cost.mean:.4f} nats and had not converged ({e.score.fit.reason})"
    return undecided(layer, why, "Give the fit more steps (--direct-steps).", facts, e)


def undecided(layer: int, why: str, advice: str, facts: Facts, e: Evidence | None = None) -> LayerVerdict:
    """Neither can be said."""
    return _make(layer, "undecided", f"Not decided: {why}.", advice, facts, e)


def too_few(layer: int, found: int, needed: int) -> LayerVerdict:
    """Too few sequences to decide anything."""
    why = f"{found} sequences on eval are too few for an interval, {needed} are needed"
    return undecided(layer, why, "Use more tokens (--tokens) or shorter sequences (--seq-len).", Facts())


def broken(layer: int, finding: Finding) -> LayerVerdict:
    """Weights or states that are not finite."""
    advice = "Do not use this checkpoint. Copy it again, or go back to the last one whose layers are finite."
    return _make(layer, "broken", finding.message, advice, Facts(score=float(2**10)))


def not_measured(layer: int) -> LayerVerdict:
    """Sound itself, in a checkpoint that is not."""
    return undecided(
        layer,
        "the checkpoint holds values that are not finite, so nothing was measured",
        "Mend it first.",
        Facts(),
    )


def with_duplicate(verdict: LayerVerdict, finding: Finding) -> LayerVerdict:
    """A layer that is another, byte for byte, is broken whatever it measures."""
    advice = "Copy or convert the checkpoint again; if the layers share weights on purpose, leave `broken` out of --fail-on."
    return replace(verdict, verdict="broken", reason=finding.message, advice=advice, notes=(verdict.reason,))
