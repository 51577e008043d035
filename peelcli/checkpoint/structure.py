"""Find a decoder's blocks, and a block's attention and MLP, by structure, without a table of class names.

The blocks are the ModuleList whose length is the number of hidden layers. The attention is the child of a block with
such a name. The MLP is every other child that holds matrices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from peelcli.errors import CheckpointError

_ATTENTION_NAME = re.compile(r"attn|attention|mixer|mamba|ssm|temporal|linear_attn|recurrent", re.IGNORECASE)
_NORM_NAME = re.compile(r"norm|(^|_)ln(_|$|\d)", re.IGNORECASE)
_OTHER_SENSES = re.compile(r"vision|visual|image|audio|speech", re.IGNORECASE)
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_NO_LAYERS = (
    "config.json does not say how many layers the model has: expected num_hidden_layers (or n_layer). "
    "Add it, or audit a checkpoint saved with save_pretrained."
)


@dataclass(frozen=True)
class Sublayer:
    """One residual update of a block. outputs: those of its modules whose output is added to the residual stream."""

    name: str  # "attention" or "mlp"
    modules: tuple[str, ...]  # names of children of the block
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a block that a scheme applies to. `transposed`: stored (…, d_in, d_out)."""

    name: str  # of the parameter, relative to the block
    transposed: bool


def text_config(config: Any) -> Any:
    """The part of a transformers config that describes the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def stated(config: Any, name: str) -> Any:
    """An attribute of a transformers config; None if it is missing or differs from layer to layer.

    transformers raises RuntimeError if such a per-layer attribute (Gemma 4's head_dim) is read from the whole config.
    """
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def layer_counts(config: object) -> tuple[int, ...]:
    """The possible numbers of decoder blocks by a transformers config, most likely first."""
    found = (stated(text_config(config), key) for key in _NUM_LAYERS)
    counts = tuple(dict.fromkeys(n for n in found if isinstance(n, int) and n > 0))
    if not counts:
        raise CheckpointError(_NO_LAYERS)
    return counts


def head_dim(config: Any, layer: int) -> int:
    """Features of one attention head in a layer (from 1); 0 if the transformers config does not say."""
    text = text_config(config)
    by_layer = stated(text, "per_layer_config") if stated(text, "is_heterogeneous") else None
    if by_layer is not None:
        text = by_layer[layer - 1]
    told, width, heads = (stated(text, key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(told, int) and told > 0:
        return told
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else 0


def layers_of(config: Mapping[str, Any]) -> int:
    """The number of decoder blocks that config.json names, before transformers has read it."""
    nested = config.get("text_config")
    for values in (config, nested if isinstance(nested, Mapping) else {}):
        for key in _NUM_LAYERS:
            if isinstance(values.get(key), int) and values[key] > 0:
                return int(values[key])
    raise CheckpointError(_NO_LAYERS)


def find_blocks(model: nn.Module, counts: Sequence[int]) -> str:
    """The dotted name of the ModuleList that holds the decoder blocks; counts: how many there may be."""
    for count in counts:
        lists = [
            (sum(p.numel() for p in module.parameters()), name)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        # The blocks hold the most parameters; an inner list of the same length (experts) is inside one of them.
        outer: list[tuple[int, str]] = [
            (size, name) for size, name in lists if not any(name.startswith(o + ".") for _, o in lists)
        ]
        if outer:
            # Blocks of a vision or audio tower are not run on text.
            _, name = max([found for found in outer if not _OTHER_SENSES.search(found[1])] or outer)
            return name
    raise CheckpointError(
        f"{type(model).__name__} has no list of {' or '.join(map(str, counts))} blocks: expected a ModuleList whose "
        "length is num_hidden_layers. peel audits decoder-only transformers with one list of blocks."
    )


def find_sublayers(block: nn.Module) -> tuple[Sublayer, ...]:
    """The attention and the MLP of a block; an empty tuple if its children's names do not distinguish them."""
    holders = [
        name
        for name, child in block.named_children()
        if not _NORM_NAME.search(name) and any(p.ndim >= 2 for p in child.parameters())
    ]
    attention = tuple(name for name in holders if _ATTENTION_NAME.search(name))
    mlp = tuple(name for name in holders if name not in attention)
    if not attention or not mlp:
        return ()
    # Linear maps directly in the block (OPT's fc1, fc2) form one MLP, and its update is the output of the last.
    bare = [name for name in mlp if isinstance(block.get_submodule(name), (nn.Linear, Conv1D))]
    outputs = (bare[-1],) if len(bare) == len(mlp) else tuple(n for n in mlp if n not in bare)
    return (Sublayer("attention", attention, attention), Sublayer("mlp", mlp, outputs))


def find_matrices(block: nn.Module) -> tuple[Matrix, ...]:
    """Every linear map of a block, the stacked experts of a mixture included; no norms, biases or convolutions."""
    matrices: list[Matrix] = []
    for name, module in block.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, (nn.Linear, Conv1D)):
            matrices.append(Matrix(prefix + "weight", isinstance(module, Conv1D)))
            continue
        transposed = bool(getattr(module, "is_transposed", False))
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and not isinstance(module, nn.Conv1d):
                matrices.append(Matrix(prefix + key, transposed))
    return tuple(matrices)
