"""Assign tensors to layers by the numbers in their names, without a table of model families.

A group is all tensors whose names have the same prefix before a number, such as `model.layers.0.…` to
`model.layers.31.…`. The layers are the group with as many numbers as the config has layers.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from peelcli.checkpoint.files import CheckpointFiles, TensorInfo
from peelcli.checkpoint.names import WRAPPERS
from peelcli.errors import CheckpointError
from peelcli.records import Finding

# Number in the name → name after the number → tensor.
_Family = dict[int, dict[str, TensorInfo]]

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
# Multi-token-prediction layers continue the numbering after the network's own layers.
_EXTRA_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def group_by_layer(
    files: CheckpointFiles, num_layers: int | None = None
) -> tuple[dict[int, dict[str, TensorInfo]], list[Finding]]:
    """Layer (from 1) → name within the layer → tensor, and findings about names that fit no layer.

    num_layers: overrides the number of layers in the config. Raises CheckpointError if a layer is missing, or lacks a
    tensor that every other layer has.
    """
    counts = [num_layers] if num_layers is not None else _counts(files.config, _COUNTS)
    extra = max(_counts(files.config, _EXTRA_COUNTS), default=0)
    families = _families(files)
    exact = [p for p, f in families.items() if any(_has(f, n) or _has(f, n + extra) for n in counts)]
    if not exact and not counts:
        exact = [prefix for prefix, family in families.items() if _has(family, len(family))]
    if exact:
        prefix = max(exact, key=lambda p: _size(families[p]))
        family = families[prefix]
        count = next((n for n in counts if _has(family, n) or _has(family, n + extra)), len(family))
        findings: list[Finding] = []
    else:
        prefix, count, findings = _nearest(files, families, counts)
        family = families.get(prefix, {})
    own = {number: members for number, members in sorted(family.items()) if number < count}
    _require_whole(files, prefix, own)
    return {number + 1: members for number, members in own.items()}, findings


def _counts(config: dict[str, Any], keys: tuple[str, ...]) -> list[int]:
    """The positive integers that the config or its text_config has under any of the keys."""
    nested = config.get("text_config")
    values = [c.get(key) for c in (nested, config) if isinstance(c, dict) for key in keys]
    return [v for v in dict.fromkeys(values) if isinstance(v, int) and not isinstance(v, bool) and v > 0]


def _families(files: CheckpointFiles) -> dict[str, _Family]:
    families: dict[str, _Family] = defaultdict(lambda: defaultdict(dict))
    for info in files.tensors.values():
        # Remove wrapper names, so that a layer's tensor names are the same with and without them.
        parts = [part for part in info.name.split(".") if part not in WRAPPERS]
        for i, part in enumerate(parts):
            # Nested numbers (experts) form groups too. They are smaller than the group of the layers around them.
            if part.isascii() and part.isdigit() and len(part) < 7:
                families[".".join(parts[:i])][int(part)][".".join(parts[i + 1 :])] = info
    return families


def _has(family: _Family, count: int) -> bool:
    return family.keys() == set(range(count))


def _size(family: _Family) -> int:
    return sum(info.numel for members in family.values() for info in members.values())


def _nearest(
    files: CheckpointFiles, families: dict[str, _Family], counts: list[int]
) -> tuple[str, int, list[Finding]]:
    """Use the largest group if none has the number of layers in the config: (prefix, number of layers, findings).

    Raises CheckpointError if at most half of that group's layers are missing.
    """
    prefix = max(families, key=lambda p: _size(families[p]), default="")
    family = families.get(prefix, {})
    said = " or ".join(map(str, counts)) or "no number"
    for count in counts:
        missing = sorted(set(range(count)) - family.keys())
        if not missing:
            surplus = sorted(family.keys() - set(range(count)))
            message = (
                f"the config says {count} layers, but the files hold {len(surplus)} more, from "
                f"{prefix}.{surplus[0]} on: they are neither loaded nor audited; correct config.json if they "
                "belong to the network"
            )
            return prefix, count, [Finding("surplus-layers", message)]
        # A group that lacks more than half of the numbers is not the layers but something else, such as experts.
        if 2 * len(missing) <= count:
            raise CheckpointError(
                f"{files.directory}: incomplete: the config says {count} layers, {prefix}.0 to "
                f"{prefix}.{count - 1}, but layer {missing[0] + 1} ({prefix}.{missing[0]}) has no tensors; "
                "copy or save the checkpoint again"
            )
    message = (
        f"no group of tensors is numbered as the layers should be (config: {said}), so the scan compared no "
        "layers; every tensor by itself was checked"
    )
    return prefix, 0, [Finding("layers-unknown", message)]


def _require_whole(files: CheckpointFiles, prefix: str, layers: _Family) -> None:
    """Raise CheckpointError if a layer lacks a tensor that every other layer has.

    A layer that also has tensors of its own is not checked, because hybrid networks have layers of several kinds. The
    first layer of some families lacks a norm or a scalar by design (ModernBERT, Zaya), so there only matrices count.
    """
    if len(layers) < 3:
        return
    owners: dict[str, set[int]] = defaultdict(set)
    for number, members in layers.items():
        for relative in members:
            owners[relative].add(number)
    for number, members in layers.items():
        others = layers.keys() - {number}
        shared = {relative for relative, who in owners.items() if others <= who}
        missing = sorted(shared - members.keys())
        sibling = layers[min(others)]
        missing = [relative for relative in missing if number > 0 or len(sibling[relative].shape) > 1]
        if missing and members.keys() < shared:
            raise CheckpointError(
                f"{files.directory}: incomplete: layer {number + 1} lacks {prefix}.{number}.{missing[0]} "
                f"({len(missing)} in all), which every other layer has; copy or save the checkpoint again"
            )
