"""In words: what was found in a layer that another layer's fault explains, and what a match adds to a proof."""

from __future__ import annotations

from dataclasses import replace

from peelcli.records import LayerVerdict
from peelcli.verdict.downstream import Behind, Finding
from peelcli.verdict.evidence import Evidence
from peelcli.verdict.words import Facts, at_its_bits, stand_in, undecided


def finding_text(finding: Finding) -> str:
    """A finding as half a sentence, with its figure."""
    reference = finding.score.reference
    if reference.is_challenge:
        return f"trained on alone it gains {finding.gap.mean:.4f} nats"
    is_lower = not isinstance(finding, Evidence) or finding.surpasses
    change = (
        f"is {finding.gap.mean:.4f} nats lower" if is_lower else f"changes by {-finding.gap.mean:+.4f} nats"
    )
    return f"with {stand_in(reference)} the loss {change}"


def behind_another(layer: int, behind: Behind, facts: Facts) -> LayerVerdict:
    """Something was found in a layer, and another layer's fault explains it."""
    finding, hurt = finding_text(behind.finding), behind.hurt
    if behind.finding.score.reference.is_span:  # the other may be idle, and so be all that the span spares
        why = f"{finding}, but layer {hurt} is flagged already, and that may be the cause"
        return undecided(layer, why, f"Mend or drop layer {hurt} first, then audit again.", facts)
    if behind.is_flagged:
        why = f"{finding}, but layer {hurt} is hurt, and that may be the cause"
        return undecided(layer, why, f"Mend layer {hurt} first, then audit again.", facts)
    why = f"{finding}, more than most layers do, but layer {hurt} gains more still, and the fault may lie in either"
    advice = f"Look at layers {hurt} and {layer}; use more tokens (--tokens) to tell them apart."
    return undecided(layer, why, advice, facts)


def behind_a_wreck(layer: int, wrecked: int, facts: Facts) -> LayerVerdict:
    """In a damaged network nothing that is measured of the other layers holds."""
    if wrecked:
        why = f"layer {wrecked} is wrecked, and every measurement of the others reflects that"
        return undecided(layer, why, f"Mend layer {wrecked} first, then audit again.", facts)
    why = (
        "the network does worse than without its blocks, and neither a layer's repair nor what the head reads behind "
        "it tells which of them is wrecked"
    )
    return undecided(
        layer, why, "Compare the weights with those that were trained, the first layers first.", facts
    )


def with_match(verdict: LayerVerdict, e: Evidence | None) -> LayerVerdict:
    """A layer that is proved to be at fault, and does no work besides."""
    if e is None:
        return verdict
    note = (
        f"With {stand_in(e.score.reference)} the loss changes by {e.cost.mean:+.4f} nats only: as it is, that part "
        "does no work."
    )
    return replace(at_its_bits(verdict, e), notes=(*verdict.notes, note))


def with_behind(verdict: LayerVerdict, behind: Behind | None) -> LayerVerdict:
    """A layer that is flagged, and in which something else was found that another layer's fault explains."""
    if behind is None:
        return verdict
    finding = finding_text(behind.finding)
    note = f"{finding[0].upper()}{finding[1:]}, which the fault of layer {behind.hurt} may explain."
    return replace(verdict, notes=(*verdict.notes, note))
