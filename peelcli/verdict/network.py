"""What is said of the network as a whole: does the text fit it, has it learned anything, is a file broken?"""

from __future__ import annotations

import math

import numpy as np

from peelcli.records import NetworkVerdict, Run
from peelcli.verdict.health import (
    data_fit,
    is_damaged,
    is_untrained,
    losses_are_finite,
    mismatch,
)
from peelcli.verdict.policy import LARGEST_CE, PLAIN_BITS, Policy
from peelcli.verdict.words import origin
from peelcli.verdict.zones import judge_paths


def judge_network(run: Run, policy: Policy) -> NetworkVerdict:
    """Loss, how well the text fits, and what concerns all layers alike."""
    broken = any(f.is_non_finite for f in run.findings)
    if not run.nll_eval:
        return NetworkVerdict(None, None, None, ("broken",) if broken else ())
    ce, entropy = float(np.mean(run.nll_eval)), float(np.mean(run.entropy_eval))
    fit = data_fit(run.nll_eval, run.entropy_eval, policy.foreign_gap)
    if not losses_are_finite(run):
        note = "The network's own loss is not finite on some sequences. Try --dtype float32; if it stays, it is broken."
        return NetworkVerdict(None, None, None, ("broken",), (note,))
    flags = ["broken"] if broken else []
    notes = []
    if is_untrained(run, policy):
        flags.append("untrained")
        fit = "unknown"
        notes.append(
            f"The network as a whole is untrained: its loss ({ce:.2f}) is no better than that of token frequencies "
            f"alone ({run.unigram_ce:.2f}), and without any of its blocks it has the same loss."
        )
    elif is_damaged(run, policy):
        flags.append("damaged")
        fit = "unknown"
        notes.append(
            f"The network as a whole is damaged: its loss ({ce:.2f}) is worse than that of token frequencies alone "
            f"({run.unigram_ce:.2f}), and without any of its blocks it is better. Where one layer is wrecked, those "
            "behind it do harm as well: mend the layer that is flagged; where none is, look at the first ones first; "
            "then audit again."
        )
    elif fit == "foreign":
        notes.append(
            f"The text is foreign to this model: its loss ({ce:.2f}) is far above its own uncertainty ({entropy:.2f}). "
            "On such text hardly any reference can surpass a layer, so a fault may go unseen. Pass text like that it "
            "was trained on with --data. If this is such text, the network as a whole is damaged."
        )
    notes += _precision_note(run, policy)
    notes += _adaptation_note(run, policy)
    notes += _rollback_note(run, policy)
    paths = judge_paths(run, policy, mismatch(run.nll_eval, run.entropy_eval))
    if paths.unconverged and not {"untrained", "damaged"} & set(flags):
        flags.append("unconverged")
    return NetworkVerdict(
        ce=ce,
        perplexity=math.exp(min(ce, LARGEST_CE)),
        entropy=entropy,
        flags=tuple(flags),
        notes=tuple(notes),
        data_fit=fit,
        zone=paths.zone,
        bounds=paths.bounds,
        path_rules=paths.rules,
    )


def _precision_note(run: Run, policy: Policy) -> list[str]:
    """Layers in many more bits than the others, where those are in few: kept so, or changed after the training."""
    usual = float(np.median(run.layer_bits)) if run.layer_bits else PLAIN_BITS
    off = [
        n
        for n, bits in enumerate(run.layer_bits, start=1)
        if usual <= policy.few_bits and bits > policy.more_bits_factor * usual
    ]
    if not off or len(run.layer_bits) < policy.min_layers:
        return []
    return [
        f"Weights of layer {', '.join(map(str, off))} lie on no grid of about {usual:.3g} bits, as those of the other "
        "layers do. Where all were trained so, something has changed them since."
    ]


def _adaptation_note(run: Run, policy: Policy) -> list[str]:
    gains = [np.subtract(run.nll_eval, s.nll_eval).mean() for s in run.scores_of("challenge")]
    gains = [g for g in gains if np.isfinite(g)]
    if len(gains) < 2 or np.median(gains) < policy.adaptation_floor:
        return []
    return [
        f"Any single layer, trained on for a few steps, gains about {np.median(gains):.2f} nats: the text differs from "
        "the training text, or the whole network is under-trained. No layer is flagged for that."
    ]


def _rollback_note(run: Run, policy: Policy) -> list[str]:
    """Where the blocks of one earlier step do better in most layers, the step that did so most."""
    gains: dict[str, list[float]] = {}
    for score in run.scores_of("rollback"):
        if np.isfinite(score.nll_eval).all():
            gain = float(np.mean(run.nll_eval) - np.mean(score.nll_eval))
            gains.setdefault(origin(score.reference), []).append(gain)
    medians = {
        name: float(np.median(found)) for name, found in gains.items() if len(found) >= policy.min_layers
    }
    best = max(medians, key=lambda name: medians[name], default=None)
    if best is None or medians[best] < policy.stale_floor:
        return []
    return [
        f"With its block of {best} in place, any single layer gains about {medians[best]:.3f} nats: the learning rate "
        "is still large, the run has got worse on this text since, or most of the checkpoint is stale. No single layer "
        "is flagged for that."
    ]
