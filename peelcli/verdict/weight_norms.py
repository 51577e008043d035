"""How large a layer's weights are beside those of the same matrices in the other layers.

A layer that hardly learned has small weights, for they grow as they are trained; noise makes them large. Neither proves
anything, but both tell a hurt layer from one that is idle by nature, or that repairs what another did. Measured on
small trained models: of attentions and MLPs whose dropping cost next to nothing, those that had been frozen, slowed
down, newly initialised or taken from an older checkpoint had matrices of .4 to .8 times the others' size, and those
that were idle by nature .8 to 1.
"""

from __future__ import annotations

import numpy as np

from peelcli.records import SUBLAYERS, Run
from peelcli.verdict.policy import Policy


def relative_size(run: Run, layer: int, part: str | None) -> float:
    """The mean, over a part's matrices (None: the block's), of ln(RMS / the same matrix's median in the other layers).

    0 where nothing is known, or too few layers have the same matrices.
    """
    if len(run.weight_rms) < Policy.min_layers:
        return 0.0
    mine = _matrices(run, layer, part)
    others = [_matrices(run, n, part) for n in range(1, len(run.weight_rms) + 1) if n != layer]
    found = []
    for name, rms in mine.items():
        theirs = [matrices[name] for matrices in others if matrices.get(name, 0.0) > 0]
        if rms > 0 and len(theirs) > 1:
            found.append(float(np.log(rms / np.median(theirs))))
    return float(np.mean(found)) if found else 0.0


def most_unlike(run: Run, layer: int) -> float:
    """The relative size of the attention or of the MLP, whichever is further from that of the other layers."""
    return max((relative_size(run, layer, part) for part in (None, *SUBLAYERS)), key=abs)


def _matrices(run: Run, layer: int, part: str | None) -> dict[str, float]:
    parts = run.weight_rms[layer - 1]
    wanted = parts.values() if part is None else [parts.get(part, {})]
    return {name: rms for matrices in wanted for name, rms in matrices.items()}
