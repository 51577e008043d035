"""One block of a model: what it runs when it is called, other weights in it, and its sublayers silenced."""

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


class Captured(Exception):  # noqa: N818  control flow, never seen outside this package
    """Raised by the last recorder: everything that was wanted is known, the head need not run."""


class Asked(threading.local):
    """What one thread asks of the skeleton, which all share: what its blocks do, and what its head is turned by."""

    make: Callable[[int], Callable[..., Any]] | None = None
    head: Tensor | None = None

    def turn(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What enters the head's matrix, turned where this thread asks for it."""
        return None if self.head is None else (args[0] + args[0] @ self.head.to(args[0]), *args[1:])


def unless_asked(own: Callable[..., Any], index: int, asked: Asked) -> Callable[..., Any]:
    """The forward of a block, unless the thread that calls it asked for another function.

    It is put in place once and stays: a block whose attributes change can't be copied by another thread.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return asked.make(index)(*args, **kwargs) if asked.make else own(*args, **kwargs)

    return forward


def same_weights(module: nn.Module) -> nn.Module:
    """A block that shares the weights of `module` and may be given others, or be silenced, without its knowing."""
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    own = copy.deepcopy(module, shared)
    own.__dict__.pop("forward", None)  # the one of `unless_asked` would run `module` itself
    return own


def silence(module: nn.Module, sublayer: Sublayer) -> list[RemovableHandle]:
    """From now on the sublayer adds nothing to the residual stream, until the handles are removed."""

    def zero(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, (tuple, list)):
            return type(out)((torch.zeros_like(out[0]), *out[1:]))
        return torch.zeros_like(out)

    return [module.get_submodule(name).register_forward_hook(zero) for name in sublayer.outputs]


@contextlib.contextmanager
def silenced(module: nn.Module, sublayer: Sublayer) -> Iterator[None]:
    """For the length of the context, the sublayer adds nothing to the residual stream."""
    handles = silence(module, sublayer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def give_back_memory() -> None:
    """Hand free memory back to the system.

    glibc keeps it in pieces that the next block's weights do not fit into: 32 layers of 13 MB took a process to 708 MB
    rather than 479. It costs milliseconds; another C library has no such function, and no such need.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def put_in_place(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a block other weights, by the names of the parameters that they replace."""
    for name, value in weights.items():
        owner, _, key = name.rpartition(".")
        holder = module.get_submodule(owner) if owner else module
        setattr(holder, key, nn.Parameter(value, requires_grad=False))
