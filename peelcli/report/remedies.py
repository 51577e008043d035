"""What to try next with a layer in training, by what was measured: a sentence for each thing that can be done."""

from __future__ import annotations

import math
from statistics import median

from peelcli.records import AuditResult, LayerVerdict, Reference
from peelcli.report.plain import short

LITTLE = 0.001  # nats; what training a layer alone may gain where freezing it costs nothing


def remedies(result: AuditResult, verdict: LayerVerdict) -> dict[str, str]:
    """Learning rate, freezing, re-initialising, precision and dropping, each with whether and why.

    A sentence claims no more than the figures in it; where nothing was measured it says what would.
    """
    if verdict.verdict == "broken":
        return {"first": "Mend the checkpoint: what trains on from weights that cannot be right is lost."}
    found = {
        "learning rate": _learning_rate,
        "freeze": _freeze,
        "re-initialise": _reinitialise,
        "precision": _precision,
        "drop": _drop,
    }
    return {topic: say(result, verdict) for topic, say in found.items()}


def peers_gap(result: AuditResult, reference: Reference) -> float | None:
    """The median gap of the same reference in the other layers; None where there are none, or none that is finite."""
    gaps = [
        result.gap_of(score.reference)
        for score in result.run.scores
        if _sort(score.reference) == _sort(reference) and score.reference.layer != reference.layer
    ]
    finite = [gap for gap in gaps if math.isfinite(gap)]
    return median(finite) if finite else None


def _sort(reference: Reference) -> tuple[object, ...]:
    """What the same reference in another layer has in common with it."""
    return (
        *(reference.kind, reference.sublayer, *reference.grid),
        *(reference.target - reference.layer, reference.origin_id),
    )


def _gap(result: AuditResult, layer: int, kind: str) -> tuple[Reference, float] | None:
    """The best whole block of a kind in `layer`, and its gap."""
    found = [
        (score.reference, result.gap_of(score.reference))
        for score in result.run.scores
        if score.reference.kind == kind
        and score.reference.layer == layer
        and score.reference.sublayer is None
    ]
    finite = [pair for pair in found if math.isfinite(pair[1])]
    return max(finite, key=lambda pair: pair[1]) if finite else None


def _kind(verdict: LayerVerdict) -> str | None:
    return verdict.reference.kind if verdict.reference else None


def _learning_rate(result: AuditResult, verdict: LayerVerdict) -> str:
    if verdict.verdict == "surpassed" and _kind(verdict) == "rollback":
        return (
            "lower it from there on, or see what the run did then: the layer has got worse, or is stale, since the "
            "checkpoint whose block does better."
        )
    alone = _gap(result, verdict.layer, "challenge")
    if alone is None:
        return (
            "not known: the layer was not trained on alone (add challenge to --references, and give text like the "
            "training text)."
        )
    gain, usual = alone[1], peers_gap(result, alone[0])
    told = f"trained on alone it gains {gain:.4f} nats"
    if usual is None:
        return f"{told}, and there is no other layer to compare with."
    told += f", where the others gain {usual:.4f} in the median"
    if verdict.verdict == "surpassed" and gain > max(2 * usual, LITTLE):
        return f"raise it for this layer: {told}."
    return f"as for the others: {told}."


def _freeze(result: AuditResult, verdict: LayerVerdict) -> str:
    if verdict.verdict == "surpassed":
        return "no: this layer is to move."
    alone = _gap(result, verdict.layer, "challenge")
    if verdict.verdict == "effective" and alone is not None and alone[1] < LITTLE:
        return (
            f"possible, to save its gradients: training it alone gains {alone[1]:.4f} nats, next to nothing."
        )
    if verdict.verdict == "matched":
        return "see first that it was not frozen already: a layer that never moved looks like this."
    return "nothing speaks for it."


def _reinitialise(result: AuditResult, verdict: LayerVerdict) -> str:
    if verdict.verdict == "surpassed":
        if _kind(verdict) == "rollback":
            return "not at random: the older block is at hand (peel graft)."
        if _kind(verdict) == "rescale":
            return "no: the same weights at other lengths do better (peel graft)."
        if _kind(verdict) == "exchange":
            return "no: its weights do better in another place (peel graft)."
        return (
            "once a fault of conversion or copying is ruled out: from the weights that do better (peel graft), or at "
            "random with a warm-up of its own."
        )
    if verdict.verdict == "matched":
        return f"worth a try where the layer is meant to work: {_lost(verdict)}."
    return f"no: {_lost(verdict)}."


def _lost(verdict: LayerVerdict) -> str:
    if verdict.drop_cost is None:
        return "what it does is not known, for leaving it out was not measured"
    return f"what it does is worth {verdict.drop_cost:.4f} nats, by the cost of leaving it out"


def _precision(result: AuditResult, verdict: LayerVerdict) -> str:
    own, enough = verdict.own_bits, verdict.effective_bits
    if own is None:
        return "not known: the layer's own bits were not read."
    if verdict.verdict == "surpassed" and verdict.reference is not None and verdict.reference.bits <= own:
        return f"not the cause: a reference of no more than its {short(own)} bits does better."
    if enough is None:
        return f"keep its {short(own)} bits: no reference of fewer did as well{_sensitive(result, verdict)}."
    if enough == 0:
        return "lower it as you like: it does as well without its weights."
    return (
        f"{short(enough)} of its {short(own)} bits suffice by what was measured{_sensitive(result, verdict)}."
    )


def _sensitive(result: AuditResult, verdict: LayerVerdict) -> str:
    """That the low-bit block costs this layer far more than the others, where it does."""
    fitted = _gap(result, verdict.layer, "direct")
    usual = peers_gap(result, fitted[0]) if fitted else None
    if fitted is None or usual is None or -fitted[1] < 3 * max(-usual, LITTLE):
        return ""
    costs = f"in {fitted[0].scheme} it costs {-fitted[1]:.4f} nats, the others {-usual:.4f} in the median"
    return f"; {costs}: where bits are short, raise those of this layer first"


def _drop(result: AuditResult, verdict: LayerVerdict) -> str:
    if verdict.drop_cost is None:
        return "not known: leaving it out was not measured (add identity to --references)."
    out = _gap(result, verdict.layer, "identity")
    usual = peers_gap(result, out[0]) if out else None
    others = "" if usual is None else f"; leaving out another costs {-usual:.4f} in the median"
    told = f"leaving it out costs {verdict.drop_cost:.4f} nats{others}"
    if verdict.verdict == "matched" and _kind(verdict) == "identity":
        return f"possible: {told}."
    return f"no: {told}."
