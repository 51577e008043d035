"""References fitted by the loss of the whole network: the blocks behind a layer are run, and run backwards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.fitting.block import ModelBlock
from peelcli.fitting.cached_states import CachedStates, StateData
from peelcli.records import FitOutcome, Reference
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.challenge import Loss, fit_challenge, mean_loss
from peelcli.references.interface import Batch, Budget, Replacement
from peelcli.references.micro_batches import MICRO_BATCH
from peelcli.references.rescale import (
    TRIED,
    Factors,
    Pieces,
    best_length,
    by_matrix,
    kept,
    newton_step,
    of_matrices,
    pieces_of,
    rescaled,
    slopes,
)
from peelcli.runtime.batch_sizes import head_batch
from peelcli.runtime.machine import available_memory
from peelcli.scoring.losses import token_losses
from peelcli.storage.activations import ActivationFile
from peelcli.verdict.health import blocks_do_harm, data_fit, does_better_than
from peelcli.verdict.policy import Policy

CHALLENGE_BATCH = 4  # sequences a step
CHALLENGE_RATE = 0.01  # relative to each weight's RMS


KINDS = ("challenge", "rescale")

Fit = tuple[Replacement, FitOutcome]


@torch.no_grad()
def is_damaged(model: BlockwiseModel, acts: ActivationFile) -> bool:
    """Whether the network is damaged: by its losses on `eval`, and those with no block between embedding and head."""
    rows = acts.rows["eval"]
    nll, unigram_ce, policy = acts.nll[rows].tolist(), acts.about["unigram_ce"], Policy()
    if does_better_than(unigram_ce, nll, policy):
        return False  # which spares a sound network the other pass
    ids = acts.ids[rows]
    step = head_batch(ids.shape[1], model.vocab_size, model.device)
    parts = [ids[at : at + step] for at in range(0, len(ids), step)]
    without = torch.cat([token_losses(model.logits(model.prepare(p).hidden, p), p)[0] for p in parts])
    return blocks_do_harm(nll, without.tolist(), unigram_ce, policy)


class LossFitter:
    """The network from the first audited layer to its loss, its blocks held in memory while one is within `open`."""

    def __init__(
        self, model: BlockwiseModel, acts: ActivationFile, first: int, seed: int, granularity: str
    ) -> None:
        """`acts` must have been extracted from `model`, with the states that enter layer `first`.

        granularity: what shares a scale in the matrices that run in few bits, where they are not in groups.
        """
        self.model, self.acts, self.first, self.seed = model, acts, first, seed
        self.granularity = granularity
        self.modules: dict[int, nn.Module] = {}
        self._held = CachedStates(acts, model.device, model.dtype)

    def why_not(self, *, is_damaged: bool) -> str | None:
        """The reason why nothing can be fitted like that, in words. is_damaged: of `is_damaged`."""
        rows = self.acts.rows["eval"]
        nll = self.acts.nll[rows].tolist()
        is_foreign = data_fit(nll, self.acts.entropy[rows].tolist()) == "foreign"
        if is_foreign and not is_damaged:
            return "the text is foreign to this model, so that every layer could only gain by adapting to it"
        free = available_memory()
        needed = 4 * sum(self.model.block_nbytes(n) for n in range(1, self.model.num_layers + 1))
        if free is not None and needed > free:
            return f"they need the whole model in memory, about {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free"
        return None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Hold the blocks in memory."""
        with contextlib.ExitStack() as stack:
            for n in range(self.first, self.model.num_layers + 1):
                self.modules[n] = stack.enter_context(self.model.block(n))
            try:
                yield
            finally:
                self.modules.clear()
                self._held.clear()

    @property
    def _at_once(self) -> bool:
        each = all(self.model.runs_at_once(n) for n in self.modules)
        return each and self.model.heads_at_once(self.acts.ids[:MICRO_BATCH].numel())

    def _data(self, part: str, layer: int) -> StateData:
        return StateData(self._held, part, layer - 1, layer - 1)

    def _loss_behind(self, block: ModelBlock) -> Loss:
        """The mean next-token loss of a batch with other weights in the block."""

        def loss(weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
            hidden = block(batch.inputs, batch.ids, weights)
            for later in range(block.layer + 1, self.model.num_layers + 1):
                hidden = self.model.run_block(later, self.modules[later], hidden, batch.ids)
            logits = self.model.logits(hidden, batch.ids)[:, :-1].float()
            return nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.ids[:, 1:].flatten().to(logits.device)
            )

        return loss

    def challenge(self, layer: int, budget: Callable[[bool], Budget]) -> Fit:
        """The layer trained on alone. budget: given whether several passes at once are faster."""
        block = ModelBlock(self.model, layer, self.modules[layer])
        loss = self._loss_behind(block)
        trained = {name: p.data for name, p in self.modules[layer].named_parameters()}
        fit, select = (self._data(p, layer) for p in ("fit", "select"))
        grids = self.acts.about["matrix_grids"][layer - 1]
        on_grid = {name: QuantSpec(g[0], g[1], self.granularity) if g else None for name, g in grids.items()}
        return fit_challenge(loss, trained, block.maps, on_grid, fit, select, budget(self._at_once))

    def rescale(self, references: Sequence[Reference]) -> dict[Reference, Fit]:
        """The matrices of each layer at other lengths."""
        began = time.perf_counter()
        blocks = {n: ModelBlock(self.model, n, module) for n, module in self.modules.items()}
        layers = dict.fromkeys(r.layer for r in references)
        matrices = {n: self._matrices(blocks[n]) for n in layers}
        attention = {n: matrices[n].get("attention", ()) for n in layers}
        pieces = {n: pieces_of(blocks[n].maps, attention[n], self.model.head_dim(n)) for n in layers}
        trained = {n: {m.name: m.weight for m in blocks[n].maps} for n in layers}

        def logits(factors: Factors, batch: Batch) -> Tensor:
            hidden = batch.inputs
            for n, block in blocks.items():
                weights = rescaled(trained[n], pieces[n], factors[n]) if n in factors else {}
                hidden = block(hidden, batch.ids, weights)
            return self.model.logits(hidden, batch.ids)

        sizes = {n: sum(p.count for p in pieces[n]) for n in layers}
        data = self._data("fit", self.first)
        found = slopes(logits, sizes, data, MICRO_BATCH, self.seed, at_once=self._at_once)
        shared = (time.perf_counter() - began) / len(references)
        out = {}
        for n in layers:
            loss, select = self._loss_behind(blocks[n]), self._data("select", n)  # read once for all parts
            for r in (r for r in references if r.layer == n):
                mine, mixing = [Pieces(p.name) for p in pieces[n]], by_matrix(pieces[n])
                if r.sublayer is not None:
                    names = matrices[n][r.sublayer]
                    mine, mixing = [p for p in pieces[n] if p.name in names], of_matrices(pieces[n], names)
                step = newton_step(found[n].mixed(mixing))
                out[r] = self._of_best_length(loss, select, trained[n], mine, step, shared)
        return out

    def _matrices(self, block: ModelBlock) -> dict[str, list[str]]:
        """The names of the matrices of each sublayer, in their order; none where they cannot be told apart."""
        return {
            s.name: [m.name for m in block.maps if m.name.split(".")[0] in s.modules]
            for s in self.model.sublayers(block.layer)
        }

    def _of_best_length(
        self,
        loss: Loss,
        select: StateData,
        trained: Mapping[str, Tensor],
        pieces: Sequence[Pieces],
        step: Tensor,
        seconds: float,
    ) -> Fit:
        """The block with so much of `step` as does best on `select`; `seconds` have gone into it."""
        began = time.perf_counter()

        def on_select(factors: Tensor) -> float:
            weights = rescaled(trained, pieces, factors)
            return mean_loss(loss, weights, select, MICRO_BATCH, TRIED, at_once=self._at_once)

        factors = best_length(on_select, step)
        return kept(pieces, factors, seconds + time.perf_counter() - began)
