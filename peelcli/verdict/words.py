"""Verdicts in words: the reason, with its figures, and what to do. One function a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from peelcli.records import Finding, LayerVerdict, Reference, Run, Score
from peelcli.verdict.end_to_end_gains import Gain
from peelcli.verdict.evidence import Evidence
from peelcli.verdict.policy import BROKEN_SCORE, Policy
from peelcli.verdict.statistics import Interval

_IN_PLACE = {
    "identity": "{part} dropped",
    "span": "one {r.scheme} block for layers {r.layer}-{r.target}",
    "challenge": "the block trained on alone",
    "rescale": "{part}'s matrices rescaled",
    "rollback": "the block of {origin}",
    "exchange": "layers {r.layer} and {r.target} in each other's place",
}
_PARTS = {None: "the block", "attention": "its attention", "mlp": "its MLP"}

IMPROVE = (
    "Compare the layer's weights with the run's earlier checkpoints and with the source of a conversion; then train on "
    "with a higher learning rate for it, or re-initialise it. `peel graft` writes the better weights in place."
)
ROLL_BACK = (
    "The layer is stale (a shard or a copy from another step) or has got worse since. Copy the checkpoint again, and "
    "compare the layer's weights with those of {origin}; if they are as trained, see what the run did to this layer "
    "from there on. `peel graft` puts the older block back."
)
REORDER = (
    "See in which order the conversion, the merge or the pipeline's stages wrote the layers. `peel graft` writes the "
    "checkpoint with the two exchanged."
)
RESCALE = (
    "See whether noise, another precision or a lost scale has come into these matrices: compare them with the run's "
    "earlier checkpoints and with the source of a conversion; if they are as trained, train on. `peel graft` writes "
    "the rescaled weights in place."
)
UNUSED = (
    "Its capacity goes unused, which may be harmless. Check that it was not frozen or left at its initial weights; "
    "otherwise drop it, or store it in fewer bits."
)
UNUSED_IN_CLASS = (
    "Random weights of the same bits, fitted for a few steps, do as well, which may be harmless. Check that it was not "
    "frozen or left at its initial weights; otherwise train on, or drop it."
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
    text = _IN_PLACE.get(reference.kind, "{part} in {r.scheme}")
    return text.format(part=_PARTS[reference.sublayer], r=reference, origin=origin(reference))


def origin(reference: Reference) -> str:
    """The earlier checkpoint that a rollback comes from: "step 400", or its id where it does not say its step."""
    step = reference.origin_step
    return f"checkpoint {reference.origin_id}" if step is None else f"step {step}"


def _costs(facts: Facts) -> str:
    """What a cost is: loss, or on foreign text the divergence from the trained model's predictions."""
    return "changes the predictions by" if facts.foreign else "costs"


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
    say = {"rollback": rolled_back, "exchange": exchanged}.get(e.score.reference.kind, surpassed_by_fit)
    return say(layer, e, facts)


def surpassed_by_fit(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """A lighter reference, dropped or fitted to the layer's states, has the lower loss: proof."""
    reason = (
        f"With {stand_in(e.score.reference)} the loss is {e.gap.mean:.4f} nats lower ({e.gap.low:+.4f} to "
        f"{e.gap.high:+.4f}): proof that the layer could be better."
    )
    return at_its_bits(_make(layer, "surpassed", reason, IMPROVE, facts, e, blame=True), e)


def rolled_back(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """The block of an earlier checkpoint has the lower loss: proof."""
    r = e.score.reference
    reason = (
        f"With {stand_in(r)} in its place the loss is {e.gap.mean:.4f} nats lower ({e.gap.low:+.4f} to "
        f"{e.gap.high:+.4f}): proof that the layer could be better, by weights that the run has had."
    )
    advice = ROLL_BACK.format(origin=origin(r))
    return _make(layer, "surpassed", reason, advice, facts, e, blame=True)


def exchanged(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """Two layers do better in each other's place: proof, by weights that the checkpoint has."""
    reason = (
        f"With {stand_in(e.score.reference)} the loss is {e.gap.mean:.4f} nats lower ({e.gap.low:+.4f} to "
        f"{e.gap.high:+.4f}): proof that they stand in the wrong order."
    )
    return _make(layer, "surpassed", reason, REORDER, facts, e, blame=True)


def with_rollback(verdict: LayerVerdict, e: Evidence | None) -> LayerVerdict:
    """A layer that something else decided on, and that an older block does better than, too."""
    if e is None or e.score.reference == verdict.reference:
        return verdict
    note = (
        f"With {stand_in(e.score.reference)} in its place the loss is {e.gap.mean:.4f} nats lower, too: see whether "
        "the layer is stale."
    )
    return replace(verdict, notes=(*verdict.notes, note))


def challenged(layer: int, x: Gain, facts: Facts) -> LayerVerdict:
    """Training this layer alone gains far more than training any other."""
    more = x.interval
    unlike = ""
    if abs(x.size) > Policy.like_size:
        how = "larger" if x.size > 0 else "smaller"
        unlike = f" Its weights are {abs(np.expm1(x.size)):.0%} {how} than those of the other layers."
    if x.travel is not None:
        unlike += f" Its biases and norms lie {np.exp(x.travel):.0%} as far from where training starts as the others'."
    reason = f"Trained on alone it gains {x.gap.mean:.4f} nats: proof that the layer could be better. "
    if more.mean > 0:
        reason += (
            f"That is {more.mean:.4f} ({more.low:+.4f} to {more.high:+.4f}) more than the other layers, which gain "
            f"{x.usual:.4f} in the median."
        )
    else:  # in a damaged network, by what else tells of the layer
        reason += f"The other layers gain {x.usual:.4f} in the median."
    return _in_excess(layer, x, reason + unlike, IMPROVE, facts)


def with_untouched(verdict: LayerVerdict, parts: Sequence[str]) -> LayerVerdict:
    """A layer that training has never reached, whatever else is found in it."""
    whose = {
        "block": "Its biases and norms",
        "attention": "The biases of its attention",
        "mlp": "The biases of its MLP",
    }
    notes = [
        f"{whose[part]} are exactly where training starts, and those of other layers are not: it was frozen there, or "
        "initialised anew."
        for part in parts
    ]
    return replace(verdict, notes=(*verdict.notes, *notes))


def at_the_turn(verdict: LayerVerdict) -> LayerVerdict:
    """In a damaged network, the first layer that makes things worse."""
    note = "It is the first layer behind which the network's own head reads the text worse than before it."
    return replace(verdict, notes=(*verdict.notes, note))


def rescaled(layer: int, x: Gain, facts: Facts) -> LayerVerdict:
    """This layer's matrices at other lengths gain far more than any other layer's do."""
    reason = (
        f"With {stand_in(x.score.reference)} ({x.score.fit.reason}) the loss is {x.gap.mean:.4f} nats lower "
        f"({x.gap.low:+.4f} to {x.gap.high:+.4f}): proof that the layer could be better. No other gains more than "
        f"{x.usual:.4f} so."
    )
    return _in_excess(layer, x, reason, RESCALE, facts)


def with_rescale(verdict: LayerVerdict, x: Gain | None) -> LayerVerdict:
    """A layer that something else surpasses, and that other lengths of its matrices do still more for."""
    if (
        x is None
        or verdict.verdict != "surpassed"
        or verdict.gap is None
        or x.gap.low <= max(0.0, verdict.gap)
    ):
        return verdict
    note = (
        f"With {stand_in(x.score.reference)} ({x.score.fit.reason}) the loss is {x.gap.mean:.4f} nats lower: see "
        "whether a scale was lost."
    )
    return replace(verdict, notes=(*verdict.notes, note))


def _in_excess(layer: int, x: Gain, reason: str, advice: str, facts: Facts) -> LayerVerdict:
    return LayerVerdict(
        layer,
        "surpassed",
        reason,
        advice,
        score=facts.score,
        gap=x.gap.mean,
        gap_interval=_interval(x.gap),
        reference=x.score.reference,
        sublayer=x.score.reference.sublayer or "block",
        effective_bits=facts.effective_bits,
        own_bits=facts.own_bits,
        fvu=facts.fvu,
        drop_cost=facts.drop_cost,
    )


def matched(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """A lighter reference is as good: capacity unused, no proof of harm."""
    what = "predictions change" if facts.foreign else "loss changes"
    reason = f"With {stand_in(e.score.reference)} the {what} by {e.cost.mean:+.4f} nats (at most {e.cost.high:+.4f}), "
    if e.from_peers:
        reason += f"where the same costs the other layers {e.usual:.4f} in the median."
    else:
        reason += f"next to nothing of what the network has learned, and no match may cost more than {e.margin:.4f}."
    is_lighter = facts.own_bits is None or e.score.reference.bits < facts.own_bits
    advice = UNUSED if is_lighter else UNUSED_IN_CLASS
    return at_its_bits(_make(layer, "matched", reason, advice, facts, e, blame=True), e)


def at_its_bits(verdict: LayerVerdict, e: Evidence) -> LayerVerdict:
    """Where the deciding reference stands in for the whole block, its bits suffice."""
    if e.score.reference.sublayer is not None:
        return verdict
    known = [e.score.reference.bits, verdict.effective_bits]
    return replace(verdict, effective_bits=min(b for b in known if b is not None))


def untrained(layer: int, e: Evidence | None, facts: Facts) -> LayerVerdict:
    """The network as a whole is untrained: every layer is matched by its absence."""
    reason = (
        "The network without any of its blocks has the same loss: nothing in this layer has been learned."
    )
    advice = "Check that the weights were loaded into the checkpoint at all; then train."
    verdict = _make(layer, "matched", reason, advice, replace(facts, effective_bits=0.0, score=1.0), e)
    return replace(verdict, sublayer="block")


def effective(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """Every reference costs clearly more than the margin."""
    reason = (
        f"Every reference costs clearly more than a match may; the closest, {stand_in(e.score.reference)}, "
        f"{_costs(facts)} {e.cost.mean:.4f} nats."
    )
    return _make(layer, "effective", reason, "", facts, e)


def straddles(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """The cost is not clearly above what a match may cost, and the reference does not match either."""
    cost = e.cost
    why = f"{stand_in(e.score.reference)} {_costs(facts)} {cost.mean:.4f} nats ({cost.low:+.4f} to {cost.high:+.4f})"
    if e.margin <= 0:
        why += ", and the other layers give no measure of what is little"
        return undecided(layer, why, "Use more tokens (--tokens), or audit more layers (--layers).", facts, e)
    if not e.costs_less:
        why += f", and a match may cost {e.margin:.4f}"
        return undecided(layer, why, "Use more tokens (--tokens).", facts, e)
    why += f", as little as in a match, but the predictions change by {e.divergence:.4f}"
    return undecided(layer, why, "Use more text like the training text (--data, --tokens).", facts, e)


def unsettled(layer: int, e: Evidence, facts: Facts) -> LayerVerdict:
    """The closest fit had not converged: more steps might have matched."""
    why = (
        f"{stand_in(e.score.reference)} {_costs(facts)} {e.cost.mean:.4f} nats, close to the {e.margin:.4f} that a "
        f"match may, and its fit had not converged ({e.score.fit.reason})"
    )
    return undecided(layer, why, "Give the fit more steps (--direct-steps).", facts, e)


def undecided(layer: int, why: str, advice: str, facts: Facts, e: Evidence | None = None) -> LayerVerdict:
    """Neither can be said."""
    return _make(layer, "undecided", f"Not decided: {why}.", advice, facts, e)


def measured_on_part(layer: int, score: Score, run: Run, policy: Policy, facts: Facts) -> LayerVerdict:
    """A reference that the fit measured on a part of `eval`, where the policy at hand wants all of it."""
    margin = policy.matched_margin
    option = "--no-screen" if margin is None else f"--matched-margin {margin:g}"
    under = "the thresholds of this report" if margin is None else option
    why = (
        f"{stand_in(score.reference)} was measured on {len(score.nll_eval)} of {len(run.nll_eval)} sequences of eval, "
        f"which is not enough under {under}"
    )
    advice = f"Run `peel audit` again with {option}, or `peel fit` on the extracted states: it measures all of them."
    return undecided(layer, why, advice, facts)


def unmeasured(layer: int, diverged: int, facts: Facts) -> LayerVerdict:
    """No reference that could say anything has finite losses."""
    if diverged:
        why = f"the losses with {diverged} of its references are not finite: their fits diverged"
        return undecided(layer, why, "Lower the step size (--learning-rate), or try --dtype float32.", facts)
    why = "no reference was measured that is lighter than the layer and costs the other layers anything"
    return undecided(
        layer, why, "Add kinds (--references), a --scheme of fewer bits, or --start fresh.", facts
    )


def no_loss(layer: int) -> LayerVerdict:
    """The trained model's own losses are not finite, so that nothing can be compared with them."""
    why = "the loss of the network itself is not finite on some sequences"
    return undecided(layer, why, "Try --dtype float32; if it stays, the checkpoint is broken.", Facts())


def too_few(layer: int, found: int, needed: int) -> LayerVerdict:
    """Too few sequences to decide anything."""
    why = f"{found} sequences on eval are too few for an interval, {needed} are needed"
    return undecided(layer, why, "Use more tokens (--tokens) or shorter sequences (--seq-len).", Facts())


def broken(layer: int, finding: Finding) -> LayerVerdict:
    """Weights or states that are not finite."""
    advice = "Do not use this checkpoint. Copy it again, or go back to the last one whose layers are finite."
    return _make(layer, "broken", finding.message, advice, Facts(score=BROKEN_SCORE))


def not_measured(layer: int) -> LayerVerdict:
    """Sound itself, in a checkpoint that is not."""
    return undecided(
        layer,
        "the checkpoint holds values that are not finite, so nothing was measured",
        "Mend it first.",
        Facts(),
    )


def with_duplicate(verdict: LayerVerdict, finding: Finding) -> LayerVerdict:
    """A layer that is another, byte for byte, is broken whatever it measures; a note says what that is."""
    advice = "Copy or convert the checkpoint again; where layers share weights on purpose, drop broken from --fail-on."
    return replace(
        verdict,
        verdict="broken",
        reason=finding.message,
        advice=advice,
        score=BROKEN_SCORE,
        notes=(verdict.reason, *verdict.notes),
    )
