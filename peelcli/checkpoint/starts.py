"""The values that a model family gives the biases and norms of a block before training."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def initial_vectors(model: nn.Module, block: nn.Module) -> dict[str, float]:
    """The initial value of each vector of a block, by its name within the block.

    transformers initialises a copy of each norm, because some families scale by the weight and others by one plus the
    weight. Biases of linear maps start at zero. A vector with several or random initial values is left out.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    found: dict[str, float] = {}
    for name, module in block.named_modules():
        own = dict(module.named_parameters(recurse=False))
        vectors = [n for n, p in own.items() if p.ndim == 1]
        if len(vectors) < len(own):
            found |= {_joined(name, n): 0.0 for n in vectors if n == "bias"}
        elif vectors:
            fresh = copy.deepcopy(module).to_empty(device="cpu")
            for p in fresh.parameters():
                p.fill_(math.nan)  # a value that the family does not set stays NaN and is left out
            for m in fresh.modules():
                m.__dict__.pop("_is_hf_initialized", None)
            model._init_weights(fresh)
            for n in vectors:
                value = dict(fresh.named_parameters(recurse=False))[n].float()
                if len(value) and bool((value == value[0]).all()):
                    found[_joined(name, n)] = float(value[0])
    return found


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
