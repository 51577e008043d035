"""How far a layer's biases and norms have come from where training starts, beside those of the other layers.

Those start at the same known values in every layer, and move as it is trained. A layer that hardly learned, or that
came from an older checkpoint, is left behind. Measured on small models of GPT-2's kind: layers as they were at 10% of
the training had moved .4 to .5 times as far as the others, at 30% .6 to .8; sound ones .8 to 1.2 times, at any age.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from peelcli.records import SUBLAYERS, Run
from peelcli.verdict.policy import UNTOUCHED_TRAVEL, Policy


def relative_travel(run: Run, layer: int, part: str | None) -> float:
    """The mean, over a part's vectors (None: the block's, norms included), of ln(travel / the others' median).

    0 where nothing is known, or too few layers have the same vectors.
    """
    mine = _vectors(run, layer, part)
    others = [_vectors(run, n, part) for n in range(1, len(run.vector_travel) + 1) if n != layer]
    found = []
    for name, travel in mine.items():
        theirs = [vectors[name] for vectors in others if vectors.get(name, 0.0) > 0]
        if len(theirs) > 1:
            found.append(math.log(max(travel / float(np.median(theirs)), UNTOUCHED_TRAVEL)))
    return float(np.mean(found)) if found else 0.0


def lags(run: Run, part: str | None) -> dict[int, float]:
    """By how much each layer's relative travel falls short of 0, beyond the furthest that any other's lies from 0."""
    travel = {n: relative_travel(run, n, part) for n in range(1, len(run.vector_travel) + 1)}
    return {
        n: -t - max((abs(o) for m, o in travel.items() if m != n), default=0.0) for n, t in travel.items()
    }


def young_parts(run: Run, policy: Policy) -> set[tuple[int, str | None]]:
    """Layers (None: the block) whose vectors lag far behind the others', and such parts of those layers."""
    late = {
        part: {n for n, lag in lags(run, part).items() if lag > policy.young_lag}
        for part in (None, *SUBLAYERS)
    }
    return {(n, part) for part, layers in late.items() for n in layers & late[None]}


def untouched(run: Run, layer: int) -> tuple[str, ...]:
    """The parts whose vectors all are exactly where training starts, while those of other layers are not."""
    if all(_is_untouched(run, layer, part) for part in (*SUBLAYERS, "block") if _vectors(run, layer, part)):
        return ("block",) if _is_untouched(run, layer, None) else ()
    return tuple(part for part in SUBLAYERS if _is_untouched(run, layer, part))


def untouched_parts(run: Run) -> set[tuple[int, str | None]]:
    """The same of the whole run, by layer and sublayer; of an untouched block (None) both sublayers are, too."""
    found = {(n, None if part == "block" else part) for n in run.layers for part in untouched(run, n)}
    return found | {(n, part) for n, whole in found if whole is None for part in SUBLAYERS}


def _is_untouched(run: Run, layer: int, part: str | None) -> bool:
    moved = relative_travel(run, layer, part)
    return moved <= math.log(UNTOUCHED_TRAVEL) and not any(_vectors(run, layer, part).values())


def _vectors(run: Run, layer: int, part: str | None) -> Mapping[str, float]:
    if not run.vector_travel:
        return {}
    parts = run.vector_travel[layer - 1]
    wanted = parts.values() if part is None else [parts.get(part, {})]
    return {name: travel for vectors in wanted for name, travel in vectors.items()}
