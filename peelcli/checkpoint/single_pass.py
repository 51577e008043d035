"""Check that running a model block by block gives the same states as the model's own forward pass.

peel records the arguments of each block in a pass whose blocks do nothing. That is correct if blocks read only the
hidden states and arguments known beforehand (masks, rotary tables). It is wrong if a block reads something else that an
earlier block computed, such as keys and values or a router's state, or if the model changes the hidden states between
two blocks.

So transformers' own forward pass runs once on real tokens, with each block's weights in memory only while it runs.
Every block runs twice on the same hidden states: as the model calls it, and as peel does. Its input must equal the
previous block's output, and its two outputs must agree; so must the logits. This costs one more reading of the weights
and two runs of two sequences. It happens before anything is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peelcli.checkpoint.library_words import library_words
from peelcli.errors import CheckpointError

if TYPE_CHECKING:
    from peelcli.checkpoint.model import BlockwiseModel

# The exceptions that a library's code raises if it gets unexpected arguments.
LIBRARY_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)
_SHARE = 0.05  # share of tokens that may exceed the tolerance, because rounding sends a few tokens to another expert


@torch.no_grad()
def require_blockwise(model: BlockwiseModel, ids: Tensor) -> None:
    """Raise CheckpointError if the states of `ids` (n_seq, seq_len) differ from those of the model's own pass."""
    expected = model.prepare(ids).hidden

    def at_block(layer: int, module: nn.Module, hidden: Tensor, plain: Tensor) -> None:
        nonlocal expected
        if _differ(hidden, expected, model.dtype):
            raise _refusal(model, f"what goes into block {layer} is not what came out of block {layer - 1}")
        arguments = model.prepare(ids).arguments[layer - 1]
        try:
            ours = model.run_with(arguments, module, hidden.clone())
        except torch.OutOfMemoryError:
            raise
        except LIBRARY_ERRORS as error:
            why = f"block {layer} cannot run on the hidden states alone ({library_words(error)})"
            raise _refusal(model, why) from error
        if _differ(ours, plain, model.dtype):
            raise _refusal(model, f"block {layer} by itself gives other states than in a plain forward pass")
        expected = plain

    logits = model.plain_pass(ids, at_block)
    if _differ(model.logits(expected, ids), logits, model.dtype):
        raise _refusal(
            model, "the last block's states by themselves give other logits than a plain forward pass"
        )


def _refusal(model: BlockwiseModel, found: str) -> CheckpointError:
    return CheckpointError(
        f"{model.family} cannot be audited block by block: {found}. peel replaces one block at a time, "
        "which needs blocks that share nothing but the hidden states. Nothing was written; "
        "peelcli/docs/families.md lists the families that can be audited."
    )


def _differ(ours: Tensor, plain: Tensor, dtype: torch.dtype) -> bool:
    """Whether more tokens differ than rounding explains. Tokens that are not finite in `plain` are ignored."""
    if ours.shape != plain.shape:
        return True
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    a, b = (t.flatten(0, 1).flatten(1).float() for t in (ours, plain))
    finite = b.isfinite().all(dim=1)
    if not bool(finite.any()):
        return False
    a, b = a[finite], b[finite]
    near = (a - b).norm(dim=1) <= tolerance * b.norm(dim=1) + 1e-12
    return float(near.float().mean()) < 1 - _SHARE
