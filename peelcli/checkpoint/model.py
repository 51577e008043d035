"""A causal language model whose blocks come into memory one at a time.

transformers builds the model with every block mapped to "disk", so that embeddings, norms and head are all that
stays in memory. One pass over the skeleton, its blocks replaced by recorders, yields the input of the first block
and the arguments (masks, rotary tables) of every block; another, with the last states put in, yields the logits.
So a stage can go layer by layer over all tokens, reading each block once, for any family that transformers knows.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peelcli.checkpoint.attention import widen_narrow_heads
from peelcli.checkpoint.few_bits import FewBits
from peelcli.checkpoint.running import AS_STORED, Running
from peelcli.checkpoint.stamp import UNSTAMPED, Stamp
from peelcli.checkpoint.starts import initial_vectors
from peelcli.checkpoint.structure import (
    Matrix,
    Sublayer,
    find_matrices,
    find_sublayers,
    head_dim,
    num_hidden_layers,
    text_config,
)
from peelcli.checkpoint.weights import BlockWeights, load_model, plain_directory, unpacked_modules
from peelcli.errors import CheckpointError
from peelcli.records import QuantizedModule

SMALL_NBYTES = 2**24  # a block of up to 16 MB has operations too short to share among threads


class _Captured(Exception):  # noqa: N818  control flow, never seen outside this file
    """Raised by the last recorder: everything that was wanted is known, the head need not run."""


@dataclass(frozen=True)
class BlockArguments:
    """What the model passes to one block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A batch on its way: `hidden` (n_seq, seq_len, d_model) is O_0; one BlockArguments a layer, layer 1 first."""

    hidden: Tensor
    arguments: tuple[BlockArguments, ...]


class _Asked(threading.local):
    """What one thread asks of the skeleton, which all share: what its blocks do, and what its head is turned by."""

    make: Callable[[int], Callable[..., Any]] | None = None
    head: Tensor | None = None

    def turn(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What enters the head's matrix, turned where this thread asks for it."""
        return None if self.head is None else (args[0] + args[0] @ self.head.to(args[0]), *args[1:])


def _unless_asked(own: Callable[..., Any], index: int, asked: _Asked) -> Callable[..., Any]:
    """The forward of a block, which a thread may ask another function to stand in for.

    It is put in place once and stays: a block whose attributes change can't be copied by another thread.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return asked.make(index)(*args, **kwargs) if asked.make else own(*args, **kwargs)

    return forward


class BlockwiseModel:
    """A checkpoint ready to run, layer by layer. Layers count from 1.

    `arguments`, `run_block` and `logits` may be called from several threads at once; where `weights` are given or
    sublayers dropped, each needs a block of its own (`same_weights`).
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: torch.dtype,
        device: str,
        offload_dir: Path,
        running: Running = AS_STORED,
        stamp: Stamp = UNSTAMPED,
    ) -> None:
        """Open `directory`. `offload_dir` takes what cannot be read in place (pickles, packed or converted weights).

        running: how its tensors become the weights that run, if not the same. stamp: how its files were found.
        CheckpointChangedError, here and whenever weights are read, where they have changed since.
        """
        self._running, self.stamp = running, stamp
        with stamp.watched():
            self.plain_directory = plain = plain_directory(directory, dtype, offload_dir, running)
            loaded = load_model(plain, dtype=dtype, device=device, offload_dir=offload_dir)
            stamp.require_unchanged()
        config, model, self.blocks_name = loaded
        widen_narrow_heads(model, device)
        self.config = config
        self.num_layers = num_hidden_layers(config)
        self.model: nn.Module = model.eval().requires_grad_(False)
        self.dtype, self.device = dtype, torch.device(device)
        self.family = type(model).__name__
        self.max_positions: int | None = getattr(text_config(config), "max_position_embeddings", None)
        self.head_dim = head_dim(config)
        self.vocab_size = int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        container = self.model.get_submodule(self.blocks_name)
        self._blocks: list[nn.Module] = list(container.children())
        self.weights = BlockWeights(self._blocks, dtype, self.device, running, self.blocks_name, stamp)
        self._quantized = FewBits(
            self.model, self._blocks, self.weights, running, unpacked_modules(self.plain_directory, running)
        )
        self._like_output: Callable[[Tensor], Any] = lambda hidden: hidden
        self._constant_arguments: bool | None = None
        self._cache: dict[tuple[int, int], tuple[BlockArguments, ...]] = {}
        self._asked = _Asked()
        for index, block in enumerate(self._blocks):
            block.forward = _unless_asked(block.forward, index, self._asked)  # type: ignore[method-assign]
        matrix = self.model.get_output_embeddings()  # type: ignore[operator]
        if matrix is not None:
            matrix.register_forward_pre_hook(self._asked.turn)
        self._probe()

    # -- weights ------------------------------------------------------------------------------------------------

    def read_weights(self, layer: int) -> dict[str, Tensor]:
        """The parameters of one block, as `BlockWeights.read` gives them."""
        return self.weights.read(layer)

    @contextlib.contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """One block with its weights in memory; they are let go when the context ends."""
        module = self._blocks[layer - 1]
        put_in_place(module, self.read_weights(layer))
        try:
            yield module
        finally:
            put_in_place(module, {n: p.to("meta") for n, p in module.named_parameters()})
            _give_back_memory()

    def block_nbytes(self, layer: int) -> int:
        """Bytes of one block's weights in the dtype it runs in."""
        parameters = self._blocks[layer - 1].parameters()
        return sum(p.numel() for p in parameters) * self.dtype.itemsize

    def runs_at_once(self, layer: int) -> bool:
        """Whether several batches may go through a block at once, a thread each, and gain by it.

        Not where each must first be put through the skeleton, which is one; and a large block, or one on an
        accelerator, keeps it busy by itself.
        """
        small = self.block_nbytes(layer) <= SMALL_NBYTES
        return small and bool(self._constant_arguments) and self.device.type == "cpu"

    def parameter_names(self, layer: int) -> tuple[str, ...]:
        """Names of one block's parameters, relative to the block."""
        return self.weights.names(layer)

    def is_alike(self, layer: int, other: int) -> bool:
        """Whether two blocks have parameters of the same names and shapes, so that each could hold the other's."""
        shapes = [{n: p.shape for n, p in self._blocks[i - 1].named_parameters()} for i in (layer, other)]
        return shapes[0] == shapes[1]

    def matrices(self, layer: int) -> tuple[Matrix, ...]:
        """The weight matrices of one block that a scheme applies to."""
        return find_matrices(self._blocks[layer - 1])

    def initial_vectors(self, layer: int) -> dict[str, float]:
        """What the biases and norms of one block start as before training, by the name of the parameter."""
        return initial_vectors(self.model, self._blocks[layer - 1])

    @property
    def runs_in_few_bits(self) -> bool:
        """Whether its tensors are packed, or latent weights that are rounded when they are used."""
        return self._running is not AS_STORED

    def quantized(self, layer: int) -> dict[str, QuantizedModule]:
        """What is known of the matrices of one block that run in few bits, by the name of the parameter.

        Of latent weights it is known once they have been read.
        """
        return self._quantized.of_layer(layer)

    def all_quantized(self) -> tuple[QuantizedModule, ...]:
        """What is known of every matrix that runs in few bits."""
        return self._quantized.everything()

    def sublayers(self, layer: int) -> tuple[Sublayer, ...]:
        """Attention and MLP of one block; empty where they could not be told apart."""
        return self._sublayers[layer - 1]

    # -- running ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _stand_ins(self, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """For the length of the context, block i's forward is make(i) in this thread."""
        self._asked.make = make
        try:
            yield
        finally:
            self._asked.make = None

    def _record(self, ids: Tensor) -> Prepared:
        recorded: list[BlockArguments] = []
        first: list[Tensor] = []

        def make(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                kwargs = dict(kwargs)
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if index == 0:
                    first.append(hidden)
                recorded.append(BlockArguments(tuple(args[1:]), kwargs))
                if index == self.num_layers - 1:
                    raise _Captured
                return self._like_output(hidden)

            return forward

        with self._stand_ins(make), torch.no_grad(), contextlib.suppress(_Captured):
            self.model(input_ids=ids.to(self.device), use_cache=False)
        if len(recorded) != self.num_layers:
            raise CheckpointError(
                f"{self.family} ran {len(recorded)} of its {self.num_layers} blocks on a plain batch: "
                "peel audits decoders that run every block once, in order."
            )
        return Prepared(first[0], tuple(recorded))

    def prepare(self, ids: Tensor) -> Prepared:
        """Embed token ids (n_seq, seq_len) and find what each block is given beside the hidden states."""
        return self._record(ids)

    def arguments(self, layer: int, ids: Tensor) -> BlockArguments:
        """The arguments of one block for a batch; kept by shape where they do not depend on the ids."""
        shape = (ids.shape[0], ids.shape[1])
        if not self._constant_arguments:
            return self._record(ids).arguments[layer - 1]
        known = self._cache.get(shape)
        if known is None:
            if len(self._cache) >= 8:  # a stage uses a few batch sizes and their remainders
                self._cache.clear()
            known = self._cache[shape] = self._record(ids).arguments
        return known[layer - 1]

    def run_block(
        self,
        layer: int,
        module: nn.Module,
        hidden: Tensor,
        ids: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        dropped: tuple[str, ...] = (),
    ) -> Tensor:
        """O_layer from O_{layer−1}, both (n_seq, seq_len, d_model), for the batch `ids` (n_seq, seq_len).

        `weights` replace parameters of the same name; the sublayers named in `dropped` contribute nothing.
        """
        arguments = self.arguments(layer, ids)
        with contextlib.ExitStack() as stack:
            for sublayer in self.sublayers(layer) if dropped else ():
                if sublayer.name in dropped:
                    stack.enter_context(silenced(module, sublayer))
            inputs = (hidden, *arguments.args)
            if weights:
                out = torch.func.functional_call(module, dict(weights), inputs, dict(arguments.kwargs))
            else:
                out = module(*inputs, **arguments.kwargs)
        return out[0] if isinstance(out, (tuple, list)) else out

    def logits(self, hidden: Tensor, ids: Tensor, head: Tensor | None = None) -> Tensor:
        """Logits (n_seq, seq_len, vocab) from O_K (n_seq, seq_len, d_model): the model's own final norm and head.

        head: A (d_model, d_model), which turns what enters the head's matrix, x, into x + x·A.
        """
        stand_in = lambda index: lambda *args, **kwargs: self._like_output(hidden)  # noqa: E731
        with self._stand_ins(stand_in):
            self._asked.head = head
            try:
                return self.model(input_ids=ids.to(self.device), use_cache=False).logits
            finally:
                self._asked.head = None

    def heads_at_once(self, num_tokens: int) -> bool:
        """Whether the logits of several batches of so many tokens may be taken at once, a thread each."""
        return self.device.type == "cpu" and 4 * num_tokens * self.vocab_size <= SMALL_NBYTES

    @property
    def head_width(self) -> int:
        """How many features enter the head's matrix. Raises CheckpointError for a model without one."""
        matrix = self.model.get_output_embeddings()  # type: ignore[operator]
        if matrix is None:
            raise CheckpointError(f"{self.family} has no output embeddings: its head cannot be refitted.")
        return int(matrix.weight.shape[-1])

    # -- what the family is like -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _probe(self) -> None:
        """Run the first block once, to learn what a block returns and whether its sublayers can be silenced."""
        length = min(8, self.max_positions or 8)
        ids = torch.arange(2 * length).view(2, length) % self.vocab_size
        self._sublayers: list[tuple[Sublayer, ...]] = [() for _ in self._blocks]
        prepared = self._record(ids)
        self._constant_arguments = _equal(
            prepared.arguments, self._record((ids + 7) % self.vocab_size).arguments
        )
        arguments = prepared.arguments[0]
        with self.block(1) as module:
            out = module(prepared.hidden, *arguments.args, **arguments.kwargs)
            if isinstance(out, (tuple, list)):
                rest = tuple(out[1:])
                self._like_output = lambda hidden: (hidden, *rest)
            found = [find_sublayers(block) for block in self._blocks]
            if found[0]:
                self._sublayers = found
                kept = self.run_block(1, module, prepared.hidden, ids, dropped=("attention", "mlp"))
                # Dropping both updates must leave the input as it was; else "dropping" means something else here.
                if not torch.allclose(kept, prepared.hidden, rtol=1e-4, atol=1e-5):
                    self._sublayers = [() for _ in self._blocks]


def same_weights(module: nn.Module) -> nn.Module:
    """A block that shares the weights of `module` and may be given others, or be silenced, without its knowing."""
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    own = copy.deepcopy(module, shared)
    own.__dict__.pop("forward", None)  # the one of `_unless_asked` would run `module` itself
    return own


def silence(module: nn.Module, sublayer: Sublayer) -> list[RemovableHandle]:
    """From now on the sublayer adds nothing to the residual stream, until the handles are removed."""

    def zero(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, (tuple, list)):
            return (torch.zeros_like(out[0]), *out[1:])
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


def _give_back_memory() -> None:
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


def _equal(a: Any, b: Any) -> bool:
    """Whether two nests of arguments hold the same tensors and plain values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, BlockArguments):
        return isinstance(b, BlockArguments) and _equal(a.args, b.args) and _equal(a.kwargs, b.kwargs)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, (int, float, str, bool, type(None), torch.dtype)) and a == b
