"""The arguments and return values of a transformer block, apart from the hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockArguments:
    """The arguments of one block other than the hidden states: masks, rotary tables, positions."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockArguments]:
        """Split a block's call into its hidden states and its other arguments.

        Lists and dicts are copied, so that a block that changes one cannot affect another block.
        """
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        return hidden, cls(_own(tuple(args[1:])), _own(rest))

    def named(self) -> Iterator[tuple[str, Any]]:
        """Each argument with its name; positional arguments are named by their position, counted from 1."""
        yield from ((f"argument {place}", value) for place, value in enumerate(self.args, start=2))
        yield from self.kwargs.items()


@dataclass(frozen=True)
class Prepared:
    """A batch after the embedding, ready for block 1.

    hidden: O_0, the input of block 1, (n_seq, seq_len, d_model). arguments: one per layer, layer 1 first.
    """

    hidden: Tensor
    arguments: tuple[BlockArguments, ...]


@dataclass(frozen=True)
class Returned:
    """The form of a block's return value: the hidden states alone, or a tuple or list that begins with them.

    kind: the tuple or list type; None for the hidden states alone.
    rest: one entry for each further item. It is the name of the argument that the block returns unchanged, or None.
    has_more: whether the block returns a tensor that it computed itself. A later block may read such a state.
    """

    kind: type | None = None
    rest: tuple[str | None, ...] = ()
    has_more: bool = False

    @classmethod
    def of(cls, out: Any, arguments: BlockArguments) -> Returned:
        """Derive the form from `out`, which a block returned for `arguments`."""
        if not isinstance(out, (tuple, list)):
            return cls()
        names = {id(value): name for name, value in arguments.named() if value is not None}
        rest = tuple(names.get(id(value)) for value in out[1:])
        made = [value for value, name in zip(out[1:], rest, strict=True) if name is None]
        return cls(list if isinstance(out, list) else tuple, rest, any(True for _ in tensors_in(made)))

    def around(self, hidden: Tensor, arguments: BlockArguments) -> Any:
        """A return value of this form with the given hidden states; tensors that the block computed are left out."""
        if self.kind is None:
            return hidden
        given = dict(arguments.named())
        return self.kind((hidden, *(None if name is None else given.get(name) for name in self.rest)))


def hidden_of(out: Any) -> Tensor:
    """The hidden states in a block's return value."""
    hidden: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return hidden


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def _own(value: Any) -> Any:
    """A copy of nested lists, tuples and dicts that shares their tensors."""
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_own(item) for item in value)
    return value


def equal(a: Any, b: Any) -> bool:
    """Whether two nested arguments hold equal tensors and plain values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, BlockArguments):
        return isinstance(b, BlockArguments) and equal(a.args, b.args) and equal(a.kwargs, b.kwargs)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(equal, a, b))
    return isinstance(a, (int, float, str, bool, type(None), torch.dtype)) and a == b
