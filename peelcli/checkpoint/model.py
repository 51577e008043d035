"""A causal language model whose blocks come into memory one at a time.

transformers builds the model with every block mapped to "disk", so that only embeddings, norms and head stay in memory.
One forward pass with recorders in place of the blocks gives the input of the first block and the arguments (masks,
rotary tables) of every block. A second pass, which starts from the last states, gives the logits. So a stage can run
all tokens through one layer after another and read each block once, for any family that transformers knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peelcli.checkpoint.arguments import BlockArguments, Prepared, Returned, equal, hidden_of
from peelcli.checkpoint.attention import unwidened, widen_narrow_heads
from peelcli.checkpoint.block import (
    RecordingDone,
    ThreadOverrides,
    give_back_memory,
    put_in_place,
    silenced,
    with_override,
)
from peelcli.checkpoint.layout import Layout
from peelcli.checkpoint.library import over_files
from peelcli.checkpoint.library_words import library_words
from peelcli.checkpoint.quantized import QuantizedWeights
from peelcli.checkpoint.running import AS_STORED, Running
from peelcli.checkpoint.single_pass import LIBRARY_ERRORS, require_blockwise
from peelcli.checkpoint.skeleton import SAME_RUN
from peelcli.checkpoint.stamp import UNSTAMPED, Stamp
from peelcli.checkpoint.starts import initial_vectors
from peelcli.checkpoint.structure import (
    Matrix,
    Sublayer,
    find_matrices,
    find_sublayers,
    head_dim,
    stated,
    text_config,
)
from peelcli.checkpoint.weights import BlockWeights, load_model, plain_directory, unpacked_modules
from peelcli.errors import CheckpointError
from peelcli.records import QuantizedModule

SMALL_NBYTES = 2**24  # blocks of up to 16 MB: their operations are too short to split among threads


class BlockwiseModel:
    """A checkpoint ready to run, layer by layer. Layers count from 1.

    `arguments`, `run_block` and `logits` may be called from several threads at once. With `weights` or dropped
    sublayers, each thread needs its own copy of the block (`same_weights`).
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
        """Open the checkpoint in `directory`.

        offload_dir: where weights are written that cannot be read in place (pickles, packed or converted weights).
        running: how stored tensors become the weights that run. stamp: the state of the files when they were found.
        Raises CheckpointChangedError, here and whenever weights are read, if a file has changed since `stamp`.
        """
        self._running, self.stamp = running, stamp
        with stamp.watched():
            self.plain_directory = plain = plain_directory(directory, dtype, offload_dir, running)
            loaded = load_model(plain, dtype=dtype, device=device, offload_dir=offload_dir)
            stamp.require_unchanged()
        config, model, self.blocks_name, self.unused_tensors = loaded
        self.model: nn.Module = model.eval().requires_grad_(False)
        widen_narrow_heads(model, device)
        if stated(config, "rescale_every"):
            # RWKV halves its states every few layers, and the weights to match, to stay in float16's range. Without
            # that the network is the same, and every block's input is the output of the block before it.
            config.rescale_every = self.model.config.rescale_every = 0  # type: ignore[union-attr]
        self.config = config
        self.dtype, self.device = dtype, torch.device(device)
        self.family = type(model).__name__
        positions = stated(text_config(config), "max_position_embeddings")
        self.max_positions = (
            positions if isinstance(positions, int) and positions > 0 else None
        )  # XLNet says −1
        self.vocab_size = int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        container = self.model.get_submodule(self.blocks_name)
        self._blocks: list[nn.Module] = list(container.children())
        self.num_layers = len(self._blocks)
        self.weights = BlockWeights(self._blocks, dtype, self.device, running, self.blocks_name, stamp)
        self._quantized = QuantizedWeights(
            self.model, self._blocks, self.weights, running, unpacked_modules(self.plain_directory, running)
        )
        self.returned, self._layout = Returned(), Layout()
        self._constant_arguments: bool | None = None
        self._cache: dict[tuple[int, int], tuple[BlockArguments, ...]] = {}
        self._overrides = ThreadOverrides()
        for index, block in enumerate(self._blocks):
            block.forward = with_override(block.forward, index, self._overrides)
        matrix = self.model.get_output_embeddings()  # type: ignore[operator]
        if matrix is not None:
            matrix.register_forward_pre_hook(self._overrides.turn)
        with over_files(directory / "config.json", "run the model that it describes", SAME_RUN):
            self._probe()

    # -- weights ------------------------------------------------------------------------------------------------

    def read_weights(self, layer: int) -> dict[str, Tensor]:
        """The parameters of one block, as `BlockWeights.read` gives them."""
        return self.weights.read(layer)

    @contextlib.contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """One block with its weights in memory, which are released when the context ends."""
        module = self._blocks[layer - 1]
        put_in_place(module, self.read_weights(layer))
        try:
            yield module
        finally:
            put_in_place(module, {n: p.to("meta") for n, p in module.named_parameters()})
            give_back_memory()

    def block_nbytes(self, layer: int) -> int:
        """Bytes of one block's weights in the dtype it runs in."""
        parameters = self._blocks[layer - 1].parameters()
        return sum(p.numel() for p in parameters) * self.dtype.itemsize

    def runs_at_once(self, layer: int) -> bool:
        """Whether running several batches through a block at once, one per thread, is possible and faster.

        It is not if the arguments depend on the token ids, because all threads share the one model that computes them.
        A large block, or one on an accelerator, keeps the processor busy by itself.
        """
        small = self.block_nbytes(layer) <= SMALL_NBYTES
        return small and bool(self._constant_arguments) and self.device.type == "cpu"

    def parameter_names(self, layer: int) -> tuple[str, ...]:
        """Names of one block's parameters, relative to the block."""
        return self.weights.names(layer)

    def is_alike(self, layer: int, other: int) -> bool:
        """Whether two blocks have parameters of the same names and shapes, so that their weights can be swapped."""
        shapes = [{n: p.shape for n, p in self._blocks[i - 1].named_parameters()} for i in (layer, other)]
        return shapes[0] == shapes[1]

    def matrices(self, layer: int) -> tuple[Matrix, ...]:
        """The weight matrices of one block that a scheme applies to."""
        return find_matrices(self._blocks[layer - 1])

    def initial_vectors(self, layer: int) -> dict[str, float]:
        """The value that each bias and norm of one block has before training, by parameter name."""
        return initial_vectors(self.model, self._blocks[layer - 1])

    @property
    def runs_in_few_bits(self) -> bool:
        """Whether the tensors are packed, or are latent weights that are rounded when they are used."""
        return self._running is not AS_STORED

    def quantized(self, layer: int) -> dict[str, QuantizedModule]:
        """How the matrices of one block are quantised, by parameter name. Latent weights appear once they were read."""
        return self._quantized.of_layer(layer)

    def all_quantized(self) -> tuple[QuantizedModule, ...]:
        """How every quantised matrix of the model is quantised. Latent weights appear once they were read."""
        return self._quantized.everything()

    def head_dim(self, layer: int) -> int:
        """Features of one attention head of a block; 0 if config.json does not say."""
        return head_dim(self.config, layer)

    def sublayers(self, layer: int) -> tuple[Sublayer, ...]:
        """Attention and MLP of one block; empty if they cannot be distinguished."""
        return self._sublayers[layer - 1]

    # -- running ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _override_blocks(self, make: Callable[[int], Callable[..., Any]] | None) -> Iterator[None]:
        """Within the context, this thread runs make(i) in place of block i's forward; None runs the block's own."""
        before, self._overrides.make = self._overrides.make, make
        try:
            yield
        finally:
            self._overrides.make = before

    def _record(self, ids: Tensor) -> Prepared:
        recorded: list[BlockArguments] = []
        first: list[Tensor] = []

        def make(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, arguments = BlockArguments.of_call(args, kwargs)
                if index == len(recorded):
                    recorded.append(arguments)
                    first.append(hidden)
                if index == self.num_layers - 1:
                    raise RecordingDone
                return self.returned.around(hidden, arguments)

            return forward

        with self._override_blocks(make), torch.no_grad(), contextlib.suppress(RecordingDone):
            self._forward(ids)
        self._require_all(len(recorded))
        return Prepared(self._layout.rows(first[0]), tuple(recorded))

    def _forward(self, ids: Tensor) -> Tensor:
        """The logits of the model's own forward pass. Raises CheckpointError if the library raises."""
        try:
            logits: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        except torch.OutOfMemoryError:
            raise
        except LIBRARY_ERRORS as error:
            raise CheckpointError(
                f"{self.family}: transformers' own forward pass does not run on token ids alone "
                f"({library_words(error)}). peel audits decoders that need nothing else."
            ) from error
        return logits

    def _require_all(self, num_run: int) -> None:
        if num_run != self.num_layers:
            raise CheckpointError(
                f"{self.family} ran {num_run} of its {self.num_layers} blocks on a plain batch: "
                "peel audits decoders that run every block once, in order."
            )

    def plain_pass(self, ids: Tensor, at_block: Callable[[int, nn.Module, Tensor, Tensor], None]) -> Tensor:
        """The logits of the model's own forward pass, with each block's weights in memory only while it runs.

        After each block it calls at_block(layer, module, hidden, out): its input and output (n_seq, seq_len, d_model).
        """
        run: list[int] = []

        def make(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = BlockArguments.of_call(args, kwargs)[0].clone()
                run.append(index)
                with self.block(index + 1) as module:
                    with self._override_blocks(None), unwidened():
                        out = module(*args, **kwargs)
                    with self._override_blocks(None):
                        at_block(index + 1, module, *map(self._layout.rows, (hidden, hidden_of(out))))
                return out

            return forward

        with self._override_blocks(make), torch.no_grad():
            logits = self._forward(ids)
        self._require_all(len(run))
        return logits

    def prepare(self, ids: Tensor) -> Prepared:
        """Embed token ids (n_seq, seq_len), and record the arguments of each block."""
        return self._record(ids)

    def arguments(self, layer: int, ids: Tensor) -> BlockArguments:
        """The arguments of one block for a batch. They are cached by shape if they do not depend on the ids."""
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

        weights: parameter name → value used in its place. dropped: names of sublayers whose update is zero.
        """
        arguments = self.arguments(layer, ids)
        with contextlib.ExitStack() as stack:
            for sublayer in self.sublayers(layer) if dropped else ():
                if sublayer.name in dropped:
                    stack.enter_context(silenced(module, sublayer))
            return self.run_with(arguments, module, hidden, weights)

    def run_with(
        self,
        arguments: BlockArguments,
        module: nn.Module,
        hidden: Tensor,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """`run_block` with given arguments instead of token ids."""
        inputs = (self._layout.own(hidden), *arguments.args)
        if weights:
            out = torch.func.functional_call(module, dict(weights), inputs, dict(arguments.kwargs))
        else:
            out = module(*inputs, **arguments.kwargs)
        return self._layout.rows(hidden_of(out))

    def logits(self, hidden: Tensor, ids: Tensor, head: Tensor | None = None) -> Tensor:
        """Logits (n_seq, seq_len, vocab) from O_K (n_seq, seq_len, d_model), by the model's own final norm and head.

        head: A (d_model, d_model); the input x of the head's matrix becomes x + x·A. None leaves x unchanged.
        """
        own = self._layout.own(hidden)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.returned.around(own, BlockArguments.of_call(args, kwargs)[1])

        with self._override_blocks(lambda index: forward):
            self._overrides.head = head
            try:
                logits: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False).logits
                return logits
            finally:
                self._overrides.head = None

    def heads_at_once(self, num_tokens: int) -> bool:
        """Whether the logits of several batches of `num_tokens` tokens may be computed at once, one per thread."""
        return self.device.type == "cpu" and 4 * num_tokens * self.vocab_size <= SMALL_NBYTES

    @property
    def head_width(self) -> int:
        """The number of input features of the head's matrix. Raises CheckpointError if the model has no head."""
        matrix = self.model.get_output_embeddings()  # type: ignore[operator]
        if matrix is None:
            raise CheckpointError(f"{self.family} has no output embeddings: its head cannot be refitted.")
        return int(matrix.weight.shape[-1])

    # -- what the family is like -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _probe(self) -> None:
        """Run the first block to find out what a block returns and whether its sublayers can be silenced."""
        length = min(8, self.max_positions or 8)
        ids = torch.arange(2 * length).view(2, length) % self.vocab_size
        self._sublayers: list[tuple[Sublayer, ...]] = [() for _ in self._blocks]
        with self.block(1) as module:
            self._learn(ids, module)
            prepared = self._record(ids)
            other = self._record((ids + 7) % self.vocab_size)
            self._constant_arguments = equal(prepared.arguments, other.arguments)
            found = [find_sublayers(block) for block in self._blocks]
            if found[0]:
                self._sublayers = found
                kept = self.run_block(1, module, prepared.hidden, ids, dropped=("attention", "mlp"))
                # With both updates dropped the output must equal the input. If not, the sublayers were misidentified.
                if not torch.allclose(kept, prepared.hidden, rtol=1e-4, atol=1e-5):
                    self._sublayers = [() for _ in self._blocks]
        if self.returned.has_more:  # a later block may read the extra states
            require_blockwise(self, ids)

    def _learn(self, ids: Tensor, module: nn.Module) -> None:
        """Run the model's own pass to find out what block 1 returns and how its hidden states are laid out.

        module: block 1, with its weights in memory.
        """
        seen: list[tuple[Tensor, Returned]] = []

        def make(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, arguments = BlockArguments.of_call(args, kwargs)
                with self._override_blocks(None):
                    seen.append((hidden, Returned.of(module(*args, **kwargs), arguments)))
                raise RecordingDone

            return forward

        def shape_of(ids: Tensor) -> torch.Size:
            with self._override_blocks(make), contextlib.suppress(RecordingDone):
                self._forward(ids)
            self._require_all(len(seen) and self.num_layers)
            return seen[-1][0].shape

        shape = shape_of(ids)
        self.returned = seen[0][1]
        if len(shape) != 3 or shape[:2] != ids.shape:
            layout = Layout.of(ids.shape, shape, shape_of(ids.repeat(2, 1)), shape_of(ids[:, :-1]))
            if layout is None:
                raise CheckpointError(
                    f"{self.family}: its blocks take hidden states of shape {list(shape)} for "
                    f"{list(ids.shape)} tokens; peel audits decoders whose states have one row a token."
                )
            self._layout = layout
