"""Change what one block of a model runs: another forward function, other weights, or a silenced sublayer."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peelcli.checkpoint.structure import Sublayer


class RecordingDone(Exception):  # noqa: N818  control flow, never seen outside this package
    """Raised by the last recorder to end the forward pass: all inputs are recorded, so the head need not run."""


class ThreadOverrides(threading.local):
    """One thread's settings for the model that all threads share.

    make: layer index → the function that this thread runs in place of the block's forward; None for the block's own.
    head: A (d_model, d_model) that is applied before the head, x → x + x·A; None for no change.
    """

    make: Callable[[int], Callable[..., Any]] | None = None
    head: Tensor | None = None

    def turn(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of the head: x → x + x·A, if this thread has set A."""
        return None if self.head is None else (args[0] + args[0] @ self.head.to(args[0]), *args[1:])


def with_override(own: Callable[..., Any], index: int, overrides: ThreadOverrides) -> Callable[..., Any]:
    """A forward function for a block: the function that the calling thread has set, or else `own`.

    It is installed once and stays. Swapping a block's attributes would break another thread that copies the block.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return overrides.make(index)(*args, **kwargs) if overrides.make else own(*args, **kwargs)

    return forward


def same_weights(module: nn.Module) -> nn.Module:
    """A copy of a block that shares its weights. Giving the copy other weights or hooks does not affect `module`."""
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    own = copy.deepcopy(module, shared)
    own.__dict__.pop("forward", None)  # the wrapped forward would run `module` instead of the copy
    return own


def silence(module: nn.Module, sublayer: Sublayer) -> list[RemovableHandle]:
    """Make a sublayer add zero to the residual stream until the returned handles are removed."""

    def zero(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, (tuple, list)):
            return type(out)((torch.zeros_like(out[0]), *out[1:]))
        return torch.zeros_like(out)

    return [module.get_submodule(name).register_forward_hook(zero) for name in sublayer.outputs]


@contextlib.contextmanager
def silenced(module: nn.Module, sublayer: Sublayer) -> Iterator[None]:
    """Within the context, the sublayer adds zero to the residual stream."""
    handles = silence(module, sublayer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def give_back_memory() -> None:
    """Return free memory to the operating system.

    glibc keeps freed memory in pieces that are too small for the next block's weights: with 32 layers of 13 MB a
    process grew to 708 MB instead of 479. The call takes milliseconds. Other C libraries lack it and do not need it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def put_in_place(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace parameters of a block. weights: parameter name within the block → new value."""
    for name, value in weights.items():
        owner, _, key = name.rpartition(".")
        holder = module.get_submodule(owner) if owner else module
        setattr(holder, key, nn.Parameter(value, requires_grad=False))
