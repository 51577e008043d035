"""Which part of a flagged layer to look at, where what decided speaks of the whole block.

A block that is trained on, or fitted in few bits, does not tell where in it the fault lies. What else was measured may:
one part that can be dropped for next to nothing, one whose matrices gain by other lengths far more than the other's,
one whose weights alone are unlike those of the other layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peelcli.records import SUBLAYERS, LayerVerdict, Run
from peelcli.verdict.end_to_end_gains import Gain, Part
from peelcli.verdict.evidence import Evidence
from peelcli.verdict.policy import TINY, Policy
from peelcli.verdict.weight_norms import relative_size

_NAMES = {"attention": "attention", "mlp": "MLP"}


def narrowed(
    verdict: LayerVerdict,
    run: Run,
    drops: Sequence[Evidence],
    rescales: Mapping[Part, Gain],
    policy: Policy,
) -> LayerVerdict:
    """The verdict, with the part to blame and a note that says why, where one stands out.

    drops: the evidence of the layer's attention and of its MLP dropped.
    """
    if verdict.verdict not in ("surpassed", "matched") or verdict.sublayer != "block":
        return verdict
    kind = verdict.reference.kind if verdict.reference else ""
    found = None
    if kind == "challenge":
        found = _by_rescale(verdict.layer, rescales, policy) or _by_drop(drops, policy)
        found = found or _by_size(run, verdict.layer, policy)
    elif kind in ("direct", "span"):
        found = _by_drop(drops, policy) or _by_size(run, verdict.layer, policy)
    elif kind == "identity":
        found = _by_size(run, verdict.layer, policy)
    if found is None:
        return verdict
    part, why = found
    return replace(
        verdict, sublayer=part, notes=(*verdict.notes, f"Look at its {_NAMES[part]} first: {why}.")
    )


def _by_drop(drops: Sequence[Evidence], policy: Policy) -> tuple[str, str] | None:
    """The part that is idle, or nearly so, where the other is not."""
    if len(drops) < len(SUBLAYERS):
        return None
    least, most = sorted(drops, key=_share)
    if _share(least) > policy.sublayer_share:
        return None
    if _share(most) <= policy.blame_factor * max(policy.sublayer_share, _share(least)):
        return None
    why = f"dropped alone it changes the loss by {least.cost.mean:+.4f} nats, the other part by {most.cost.mean:+.4f}"
    return str(least.score.reference.sublayer), why


def _share(e: Evidence) -> float:
    """What a drop costs, of what the same costs the other layers."""
    return e.cost.mean / max(e.usual, TINY)


def _by_rescale(layer: int, rescales: Mapping[Part, Gain], policy: Policy) -> tuple[str, str] | None:
    gains = {part: rescales[layer, part].gap.mean for part in SUBLAYERS if (layer, part) in rescales}
    if len(gains) < len(SUBLAYERS):
        return None
    most, least = sorted(gains, key=lambda part: gains[part], reverse=True)
    if gains[most] <= max(policy.rescale_floor, policy.blame_factor * gains[least]):
        return None
    return most, (
        f"its matrices at other lengths gain {gains[most]:.4f} nats, those of the {_NAMES[least]} {gains[least]:.4f}"
    )


def _by_size(run: Run, layer: int, policy: Policy) -> tuple[str, str] | None:
    sizes = {part: relative_size(run, layer, part) for part in SUBLAYERS}
    most, least = sorted(sizes, key=lambda part: abs(sizes[part]), reverse=True)
    if abs(sizes[most]) < max(policy.unlike_size, policy.blame_factor * abs(sizes[least])):
        return None
    return most, "its weights alone are unlike in size those of the other layers"
