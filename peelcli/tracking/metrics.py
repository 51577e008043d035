"""The figures of an audit by name, for loggers that draw one curve for each figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LAYER_FIGURES = ("score", "gap", "effective_bits", "fvu", "drop_cost")
NETWORK_FIGURES = ("ce", "perplexity")


def metrics_of(run: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a run in the JSON report, or of a history line: `peel/ce`, `peel/layer_003/score` and so on.

    What has no figure is left out; `peel/flagged` is the number of flagged layers.
    """
    found: dict[str, float] = {"peel/flagged": float(len(run["flagged_layers"]))}
    found |= _figures("peel", run["network"], NETWORK_FIGURES)
    for layer in run["layers"]:
        name = f"peel/layer_{layer['layer']:03d}"
        found |= _figures(name, layer, LAYER_FIGURES)
        found[f"{name}/flagged"] = float(layer["flagged"])
    return found


def _figures(prefix: str, values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(values[name]) for name in names if values.get(name) is not None}
