"""A run's series as an audit leaves it, of any length and depth, with one layer that stops learning."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from hand_made import NETWORK, RUN

from peelcli.records import (
    AuditResult,
    Bound,
    Bounds,
    FitOutcome,
    LayerVerdict,
    Paths,
    PathScore,
    Reference,
    Score,
)

FIT = FitOutcome(
    "warm", 40, True, "the loss on select no longer falls", fvu_fit=0.2, fvu_eval=0.21, seconds=0.8
)


def series(num_layers: int, num_runs: int, stuck: int = 3, name: str = "checkpoint") -> list[AuditResult]:
    """`num_runs` checkpoints of a run, the same at every call; layer `stuck` is flagged from the middle on."""
    draw = random.Random(0)
    return [_result(number, num_layers, num_runs, stuck, name, draw) for number in range(1, num_runs + 1)]


def _result(
    number: int, num_layers: int, num_runs: int, stuck: int, name: str, draw: random.Random
) -> AuditResult:
    share = number / num_runs
    ce = 1.6 + 3.2 * math.exp(-4 * share) + draw.gauss(0, 0.01)
    layers = tuple(
        _layer(layer, share, layer == stuck and share > 0.5, draw) for layer in range(1, num_layers + 1)
    )
    tried = [
        Reference(kind, layer, layer, sublayer, None if kind == "identity" else "ternary", bits=1.58)
        for layer in range(1, num_layers + 1)
        for kind in ("identity", "direct")
        for sublayer in (None, "attention", "mlp")
    ]
    scores = tuple(
        Score(reference, FIT, (ce, ce), (ce + 0.1, ce + draw.random()), (0.1, 0.2)) for reference in tried
    )
    maps = [
        [layer] * layer + [num_layers] * (num_layers - layer) for layer in range(1, min(num_layers, 12) + 1)
    ]
    peeled = tuple(_path(tuple(m), 2.3 + 1.8 * math.exp(-3 * share) + draw.random() * 0.4) for m in maps)
    best = min(peeled, key=lambda s: s.nll_eval[0])
    bounds = Bounds(
        control=ce - 0.02,
        head_gap=0.02,
        head_interval=(0.01, 0.03),
        head_allowance=0.1,
        yes=Bound(best.target_map, best.nll_eval[0], ce - best.nll_eval[0], (-0.1, 0.1)),
        last=Bound(
            maps[0] and (num_layers,) * num_layers,
            best.nll_eval[0] + 0.3,
            ce - best.nll_eval[0] - 0.3,
            (-0.1, 0.1),
        ),
        beaten=sum(s.nll_eval[0] > ce for s in peeled),
        peeled=len(peeled),
        threshold=0.001,
        running_minimum=2.3 + 1.8 * math.exp(-3 * share),
    )
    zone = "red" if share < 0.15 else "yellow" if share < 0.4 else "green"
    run = replace(
        RUN,
        checkpoint=f"runs/a/{name}-{number * 100}",
        checkpoint_id=f"{number:012x}",
        step=number * 100,
        num_layers=num_layers,
        layers=tuple(range(1, num_layers + 1)),
        scores=scores,
        paths=Paths(_path((), ce - 0.02), peeled, ("ternary",) * num_layers, num_fits=30, seconds=3.0),
        nll_eval=(ce, ce),
        findings=(),
        skipped=(),
    )
    network = replace(NETWORK, ce=ce, perplexity=math.exp(ce), notes=(), zone=zone, bounds=bounds)
    flagged = tuple(v.layer for v in layers if v.verdict in ("surpassed", "matched"))
    return AuditResult(run, network, layers, flagged, network_flagged=zone == "red")


def _path(target_map: tuple[int, ...], ce: float) -> PathScore:
    return PathScore(target_map, (FIT,), tuple(0.2 for _ in target_map), (ce, ce), (ce, ce))


def _layer(layer: int, share: float, stuck: bool, draw: random.Random) -> LayerVerdict:
    gap = (0.03 if stuck else -0.25 * share / layer**0.5) + draw.gauss(0, 0.004)
    verdict = "surpassed" if stuck else "undecided" if gap > -0.004 else "effective"
    low, high = gap - 0.002 - draw.random() * 0.01, gap + 0.002 + draw.random() * 0.01
    sublayer = draw.choice((None, "attention", "mlp"))
    part = {None: "the block", "attention": "its attention", "mlp": "its MLP"}[sublayer]
    reasons = {
        "surpassed": f"With {part} in ternary the loss is {gap:.4f} nats lower ({low:+.4f} to {high:+.4f}): "
        "proof that the layer could be better.",
        "undecided": f"Not decided: {part} in ternary costs {-gap:.4f} nats ({-high:+.4f} to {-low:+.4f}), and a "
        f"match may cost {abs(gap) + 0.001:.4f}.",
        "effective": f"Every reference costs clearly more than a match may; the closest, {part} in ternary, costs "
        f"{-gap:.4f} nats.",
    }
    advice = {
        "surpassed": "Train on with a higher learning rate for it.",
        "undecided": "Use more tokens (--tokens).",
    }
    return LayerVerdict(
        layer,
        verdict,
        reasons[verdict],
        advice.get(verdict, ""),
        score=gap,
        gap=gap,
        gap_interval=(low, high),
        reference=Reference("direct", layer, layer, sublayer, "ternary", bits=1.58),
        sublayer="block" if stuck else None,
        effective_bits=draw.choice((None, 1.58, 2.0, 4.0, 8.0)),
        own_bits=16.0,
        fvu=draw.random() * 0.5,
        drop_cost=abs(draw.gauss(1, 0.5)),
    )
