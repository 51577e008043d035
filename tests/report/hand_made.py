"""Results built by hand: one with a layer of every verdict, and ways to vary it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peelcli.records import (
    AuditResult,
    Comparison,
    Finding,
    FitOutcome,
    LayerChange,
    LayerVerdict,
    NetworkVerdict,
    Reference,
    Run,
    Score,
)

DROP_ATTENTION = Reference("identity", 3, 3, sublayer="attention")
DIRECT_ATTENTION = Reference("direct", 1, 1, sublayer="attention", scheme="ternary", bits=1.58)
DIRECT = Reference("direct", 2, 2, scheme="ternary", group_size=128, bits=1.58)
SPAN = Reference("span", 4, 5, scheme="int4", bits=2.0)

LAYERS = (
    LayerVerdict(
        1, "effective", "every reference costs at least 0.204", "", score=-0.204, gap=-0.204,
        gap_interval=(-0.22, -0.188), reference=DIRECT_ATTENTION, effective_bits=4.0, own_bits=16.0, fvu=0.31,
        drop_cost=2.28,
    ),
    LayerVerdict(
        2, "matched", "a ternary stand-in costs 0.0002, below the margin of 0.002",
        "Compare with the layer's peers, or prune it.", score=-0.0002, gap=-0.0002,
        gap_interval=(-0.0009, 0.0005), reference=DIRECT, sublayer="block", effective_bits=1.58,
        own_bits=16.0, fvu=0.0421, drop_cost=0.0104,
    ),
    LayerVerdict(
        3, "surpassed", "dropping its attention lowers the loss by 0.0100",
        "Check the rotary permutation of q and k; replay it with peel verify.", score=0.0100, gap=0.0100,
        gap_interval=(0.0060, 0.0140), reference=DROP_ATTENTION, sublayer="attention", effective_bits=0.0,
        own_bits=16.0, drop_cost=0.21,
    ),
    LayerVerdict(
        4, "undecided", "the interval straddles the margin", "Audit again with --tokens 65536.",
        score=-0.0021, gap=-0.0021, gap_interval=(-0.0081, 0.0039), reference=SPAN, own_bits=16.0, fvu=0.4,
        drop_cost=0.06,
    ),
    LayerVerdict(
        5, "broken", "12 weights are not finite", "Restore the checkpoint.",
        notes=("the scan names the tensors",),
    ),
)  # fmt: skip

DROPPED = FitOutcome("none", 0, True, "nothing is fitted")
FITTED = FitOutcome("fresh", 80, False, "out of steps", fvu_fit=0.04, fvu_eval=0.0421, seconds=1.5)
RUN = Run(
    checkpoint="/runs/a/ckpt-5000", checkpoint_id="3f9ac1d2b4e05f67", num_layers=5, layers=(1, 2, 3, 4, 5),
    scheme="ternary", seed=0, tokens={"fit": 16384, "select": 8192, "eval": 16384}, seq_len=128,
    data="CPython's documentation", vocab_size=512, nll_select=(1.8, 1.9), nll_eval=(1.8, 1.92),
    entropy_eval=(1.8, 1.78), unigram_ce=5.21, layer_bits=(16.0,) * 5, step=5000, family="llama",
    dtype="float32", device="cpu", config={"margin": 0.002, "layers": None},
    scores=(
        Score(DROP_ATTENTION, DROPPED, (1.8, 1.9), (1.79, 1.91), (0.1, 0.3)),
        Score(DIRECT, FITTED, (1.8, 1.9), (1.8, 1.9204), (0.01, 0.03)),
    ),
    findings=(Finding("non-finite", "12 of 4096 values", 5, "model.layers.4.mlp.up_proj.weight"),),
    skipped=("span from layer 5: nothing lies above it",), seconds=12.5,
)  # fmt: skip

NETWORK = NetworkVerdict(1.86, 6.4237, 1.79, notes=("layers 1 and 5 share no weights",), data_fit="own")
RESULT = AuditResult(RUN, NETWORK, LAYERS, flagged=(2, 3, 5))


def varied(
    *, run: dict[str, Any] | None = None, network: dict[str, Any] | None = None, **changes: Any
) -> AuditResult:
    """RESULT with some fields of its run, of its network verdict or of its own replaced."""
    result = replace(RESULT, **changes)
    return replace(
        result, run=replace(result.run, **run or {}), network=replace(result.network, **network or {})
    )


def healthy(num_layers: int = 5) -> AuditResult:
    """A result of `num_layers` layers, all of them effective."""
    layers = tuple(
        replace(LAYERS[0], layer=layer, score=-0.2 / layer, gap=-0.2 / layer)
        for layer in range(1, num_layers + 1)
    )
    run = {"num_layers": num_layers, "layers": tuple(range(1, num_layers + 1)), "findings": (), "skipped": ()}
    return varied(layers=layers, flagged=(), run=run, network={"notes": ()})


def hostile(name: str) -> AuditResult:
    """RESULT with `name` wherever a string of a checkpoint, or made from one, can stand; layer 3 is flagged."""
    reference = LAYERS[2].reference
    assert reference is not None
    verdict = replace(
        LAYERS[2], reason=name, advice=name, notes=(name,), reference=replace(reference, scheme=name)
    )
    named = dict.fromkeys(
        ("checkpoint", "checkpoint_id", "family", "dtype", "device", "data", "scheme"), name
    )
    run = {**named, "findings": (Finding(name, name, 1, name),), "skipped": (name,), "tokens": {name: 1}}
    return varied(
        run=run, network={"notes": (name,), "flags": (name,)}, layers=(verdict,), network_flagged=True
    )


def regressed(before: str = "night-1", was: str = "effective") -> AuditResult:
    """A second night: layer 2 is effective still and has regressed, layer 4 was not audited; both are flagged."""
    why = "byte for byte what it was then, while other layers have moved."
    result = healthy(3)
    layers = (
        result.layers[0],
        replace(result.layers[1], notes=(f"Regressed: {why}",)),
        result.layers[2],
        LayerVerdict(4, "undecided", "it was audited then, and is not now.", "Audit it again (--layers)."),
    )
    changes = (
        LayerChange(1, "same", was, "effective", "", 0.0001, (-0.0005, 0.0007), DIRECT_ATTENTION),
        LayerChange(2, "regressed", was, "effective", why, 0.0, (0.0, 0.0), DIRECT),
        LayerChange(3, "same", was, "effective", "", -0.0002, (-0.0008, 0.0004), DROP_ATTENTION),
        LayerChange(4, "missing", was, None, "it was audited then, and is not now."),
    )
    comparison = Comparison(before, "abc", 400, True, changes, 0.002, (-0.001, 0.005))
    return replace(result, layers=layers, flagged=(2, 4), comparison=comparison)
