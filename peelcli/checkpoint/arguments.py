"""What a model passes to its blocks beside the hidden states, and what a block hands back beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockArguments:
    """What the model passes to one block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockArguments]:
        """The hidden states of a call, and the rest of it.

        Lists and dicts are copied: what one block puts into them must not reach another one unseen.
        """
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        return hidden, cls(_own(tuple(args[1:])), _own(rest))

    def named(self) -> Iterator[tuple[str, Any]]:
        """Every argument with its name, or its place."""
        yield from ((f"argument {place}", value) for place, value in enumerate(self.args, start=2))
        yield from self.kwargs.items()


@dataclass(frozen=True)
class Prepared:
    """A batch on its way: `hidden` (n_seq, seq_len, d_model) is O_0; one BlockArguments a layer, layer 1 first."""

    hidden: Tensor
    arguments: tuple[BlockArguments, ...]


@dataclass(frozen=True)
class Returned:
    """What the blocks of a family return: hidden states alone, or the first item of a tuple or list.

    rest: one entry a further item: the name of the argument that is handed through, None for anything else. A tensor
    among them is a state that the next block may read. has_more: whether there was one.
    """

    kind: type | None = None
    rest: tuple[str | None, ...] = ()
    has_more: bool = False

    @classmethod
    def of(cls, out: Any, arguments: BlockArguments) -> Returned:
        """Learn it from what one block returned for its arguments."""
        if not isinstance(out, (tuple, list)):
            return cls()
        names = {id(value): name for name, value in arguments.named() if value is not None}
        rest = tuple(names.get(id(value)) for value in out[1:])
        made = [value for value, name in zip(out[1:], rest, strict=True) if name is None]
        return cls(list if isinstance(out, list) else tuple, rest, any(True for _ in tensors_in(made)))

    def around(self, hidden: Tensor, arguments: BlockArguments) -> Any:
        """What a block would return whose hidden states are `hidden`, without what it computes beside them."""
        if self.kind is None:
            return hidden
        given = dict(arguments.named())
        return self.kind((hidden, *(None if name is None else given.get(name) for name in self.rest)))


def hidden_of(out: Any) -> Tensor:
    """The hidden states in what a block returned."""
    hidden: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return hidden


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a nest of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def _own(value: Any) -> Any:
    """The same nest with lists and dicts of its own, and the same tensors."""
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_own(item) for item in value)
    return value


def equal(a: Any, b: Any) -> bool:
    """Whether two nests of arguments hold the same tensors and plain values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, BlockArguments):
        return isinstance(b, BlockArguments) and equal(a.args, b.args) and equal(a.kwargs, b.kwargs)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(equal, a, b))
    return isinstance(a, (int, float, str, bool, type(None), torch.dtype)) and a == b
