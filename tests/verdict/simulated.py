"""Runs made of drawn per-sequence losses: what a sound network measures, and the same with a fault in one layer.

Costs and their spread are those measured on a real 5-layer model: dropping a block costs .8 to 2.8 nats, its
attention .14 to .51, its MLP .59 to .84; ternary stand-ins cost .10 to .30, .02 to .07 and .08 to .17. A sequence's
difference has a deviation of about a fifth of the cost and .03 besides, heavy tails, and much in common with others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peelcli.records import FitOutcome, Reference, Run, Score

BITS = {"binary": 1.0, "ternary": np.log2(3), "int2": 2.0, "int3": 3.0, "int4": 4.0, "int8": 8.0, "fp": 16.0}
LADDER = {"binary": 0.40, "int2": 0.19, "int3": 0.05, "int4": 0.014, "int8": 0.0002}
PARTS = (None, "attention", "mlp")
DROPPED = {None: 0.9, "attention": 0.2, "mlp": 0.65}
TERNARY = {None: 0.19, "attention": 0.05, "mlp": 0.14}
GAIN = 0.09  # what training any one layer on for a few steps gains
RESCALED = {None: 0.0015, "attention": 0.0015, "mlp": 0.0005}  # what rescaling one layer's matrices gains
CE, ENTROPY, UNIGRAM = 1.73, 1.43, 4.86


def identity(layer: int, sublayer: str | None = None, target: int | None = None) -> Reference:
    """A block, or a sublayer of it, or the blocks up to `target`, dropped."""
    return Reference("identity", layer, target or layer, sublayer)


def direct(layer: int, sublayer: str | None = None, scheme: str = "ternary") -> Reference:
    """A block or a sublayer of it in a scheme."""
    return Reference("direct", layer, layer, sublayer, scheme, None, BITS[scheme])


def span(layer: int, target: int) -> Reference:
    """One ternary block for several."""
    return Reference("span", layer, target, None, "ternary", None, BITS["ternary"] / (target - layer + 1))


def challenge(layer: int, bits: float = 32.0) -> Reference:
    """The block trained on alone."""
    return Reference("challenge", layer, layer, None, None, None, bits)


def rescale(layer: int, sublayer: str | None = None, bits: float = 32.0) -> Reference:
    """The matrices of the block, or of a sublayer of it, at other lengths."""
    return Reference("rescale", layer, layer, sublayer, bits=bits)


def rollback(layer: int, step: int = 400, bits: float = 32.0) -> Reference:
    """The block as an earlier checkpoint has it."""
    return Reference("rollback", layer, layer, bits=bits, origin_id=f"{step:012x}", origin_step=step)


def exchange(layer: int, bits: float = 32.0) -> Reference:
    """The block and the next in each other's place."""
    return Reference("exchange", layer, layer + 1, bits=bits)


@dataclass(frozen=True)
class Effect:
    """What a reference does in truth: loss added, and divergence (by default what goes with such a cost)."""

    cost: float
    divergence: float | None = None
    spread: float = 1.0
    start: str = "warm"
    converged: bool = True


def sound(
    num_layers: int = 5, *, ladder: bool = True, layers: tuple[int, ...] | None = None
) -> dict[Reference, Effect]:
    """The references that the tool would measure on a sound network, and what they cost there."""
    found: dict[Reference, float] = {}
    for n in layers or range(1, num_layers + 1):
        first = 3.0 if n == 1 and num_layers > 1 else 1.0  # the first layer is worth several others
        uneven = 1.0 + 0.1 * np.sin(2.0 * n)
        for part in PARTS:
            found[identity(n, part)] = first * uneven * DROPPED[part]
            found[direct(n, part)] = uneven * TERNARY[part]
        for last in (n + 1, n + 2):
            if last <= num_layers:
                found[span(n, last)] = 0.8 * (last - n) * uneven
        found |= {direct(n, None, s): c * uneven for s, c in LADDER.items()} if ladder else {}
        found[challenge(n)] = -GAIN * (1.1 - 0.02 * n)
        if n == 1 and num_layers > 1:
            found[identity(1, target=num_layers)] = 20.0
    audited = layers or range(1, num_layers + 1)
    found |= {rescale(n, part): -gain for n in audited for part, gain in RESCALED.items()}
    starts = {"identity": "none", "rescale": "trained"}
    spreads = {"rescale": 0.1}  # a few factors change each sequence little
    return {
        r: Effect(c, start=starts.get(r.kind, "warm"), spread=spreads.get(r.kind, 1.0))
        for r, c in found.items()
    }


def changed(
    effects: Mapping[Reference, Effect], costs: Mapping[Reference, float], **more: Any
) -> dict[Reference, Effect]:
    """The same references with some costs changed, and with `more` of those changed."""
    return dict(effects) | {r: replace(effects[r], cost=c, **more) for r, c in costs.items()}


def idle(layer: int, num_layers: int = 5, *, part: str | None = None) -> dict[Reference, float]:
    """The costs that vanish where a block (or one part of it) does nothing; a span over it spares one layer's work."""
    parts = PARTS if part is None else (part,)
    costs = {make(layer, p): 0.0 for make in (identity, direct) for p in parts}
    if part is None:
        costs |= {direct(layer, None, s): 0.0 for s in LADDER}
        for first in (layer - 1, layer):
            if first >= 1 and first < num_layers:
                costs[span(first, first + 1)] = 0.19
    return costs


def sizes(
    factors: Mapping[int, float], num_layers: int = 5, part: str | None = None
) -> tuple[dict[str, dict[str, float]], ...]:
    """Root mean squares of the weights of every layer, some layers' (or one sublayer's of them) times a factor."""
    matrices = {"attention": ("q", "o"), "mlp": ("up", "down")}
    return tuple(
        {
            name: {
                m: (0.1 + 0.01 * i) * (factors.get(n, 1.0) if part in (None, name) else 1.0)
                for i, m in enumerate(ms)
            }
            for name, ms in matrices.items()
        }
        for n in range(1, num_layers + 1)
    )


def travels(
    factors: Mapping[int, float], num_layers: int = 5, part: str | None = None
) -> tuple[dict[str, dict[str, float]], ...]:
    """How far the biases and norms of every layer have moved, some layers' (or one sublayer's of them) times a factor.

    They differ by nature, up to a tenth.
    """
    vectors = {"attention": ("q", "o"), "mlp": ("up", "down"), "block": ("norm_1", "norm_2")}
    return tuple(
        {
            name: {
                v: (0.1 + 0.01 * i)
                * (1.0 + 0.1 * np.sin(n + i))
                * (factors.get(n, 1.0) if part in (None, name) else 1.0)
                for i, v in enumerate(vs)
            }
            for name, vs in vectors.items()
        }
        for n in range(1, num_layers + 1)
    )


def measure(
    effects: Mapping[Reference, Effect],
    *,
    num_layers: int = 5,
    seed: int = 0,
    n_eval: int = 64,
    n_select: int = 32,
    noise: float = 0.03,
    **fields: Any,
) -> Run:
    """Draw the losses of a run: paired, heavy-tailed, and correlated between references."""
    rng = np.random.default_rng(seed)
    n = n_select + n_eval

    def heavy(size: Any = n) -> np.ndarray:
        return rng.standard_t(4, size) / np.sqrt(2.0)  # unit variance

    base = CE + 0.35 * rng.standard_normal(n)
    shared = heavy()  # what every reference does to a sequence, (n,)
    scores = []
    for reference, effect in effects.items():
        own = 0.8 * shared + 0.6 * heavy()
        deviation = (0.2 * abs(effect.cost) + noise) * effect.spread
        cost = effect.cost + (deviation * own if effect.spread else np.zeros(n))
        divergence = effect.divergence
        if divergence is None:  # a changed block changes predictions, whether they get worse or not
            divergence = 1.1 * abs(effect.cost)
        kl = divergence * np.exp(0.3 * rng.standard_normal(n) - 0.045)
        nll = base + cost
        outcome = FitOutcome(effect.start, 60, effect.converged, "as drawn", fvu_eval=0.3)
        scores.append(
            Score(reference, outcome, tuple(nll[:n_select]), tuple(nll[n_select:]), tuple(kl[n_select:]))
        )
    shift = base[n_select:].mean() - CE
    described: dict[str, Any] = {
        "checkpoint": "run/checkpoint-100", "checkpoint_id": "c0ffee", "num_layers": num_layers,
        "layers": tuple(range(1, num_layers + 1)), "seed": seed, "seq_len": 256, "data": "drawn", "vocab_size": 512,
        "tokens": {"fit": 16384, "select": 256 * n_select, "eval": 256 * n_eval}, "scheme": "ternary",
        "nll_select": tuple(base[:n_select]), "nll_eval": tuple(base[n_select:] - shift),
        "entropy_eval": tuple(base[n_select:] - shift - (CE - ENTROPY)), "unigram_ce": UNIGRAM,
        "layer_bits": (32.0,) * num_layers,
    }  # fmt: skip
    scores = [replace(s, nll_eval=tuple(np.subtract(s.nll_eval, shift))) for s in scores]
    return Run(**{**described, "scores": tuple(scores), **fields})


def foreign(run: Run, mismatch: float = 2.9) -> Run:
    """The same losses on text that the model is wrongly sure about."""
    return replace(run, entropy_eval=tuple(np.subtract(run.nll_eval, mismatch)))


def rescored(run: Run, reference: Reference, **losses: Any) -> Run:
    """The same run with some losses of one reference replaced."""
    scores = tuple(replace(s, **losses) if s.reference == reference else s for s in run.scores)
    assert scores != run.scores, f"{reference.key} is not in the run, or keeps its losses"
    return replace(run, scores=scores)


def score_of(run: Run, reference: Reference) -> Score:
    """The measured losses of one reference."""
    return next(s for s in run.scores if s.reference == reference)
