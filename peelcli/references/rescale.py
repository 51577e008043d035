"""`rescale`: a block's matrices at other lengths, one factor each (its attention's: one a head), fitted end to end.

A matrix that training has settled gains next to nothing by another length, and a handful of factors cannot adapt to a
text; one that holds noise, is stale, or was scaled wrongly in a conversion does gain. Where a challenge raises a hurt
layer and its neighbours alike, this tells them apart (measured on small GPT-2s: noise in a layer gains it .007 to .010,
the others .001 to .003; an attention of an older step in a small Llama gains .017, the others .002).

    w ← w · (1 + t δ),  δ = −F⁻¹ g

one step of Newton's method, of the length t that does best on `select`; g is the loss's gradient by the factors of one
layer and F their Fisher information, from labels that the model itself draws (Martens 2020, "New insights and
perspectives on the natural gradient method").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peelcli.records import SUBLAYERS, FitOutcome, Reference
from peelcli.references.interface import Batch, Data, LinearMap, Replacement, Scaling
from peelcli.references.plan import Plan
from peelcli.runtime.workers import in_parallel

BATCHES = 64  # at least, where there are as many sequences: what F is taken from
FARTHEST = 0.75  # of a factor from 1: beyond, one step of Newton's method says no more than a direction
LENGTHS = (1.0, 0.5, 0.25)  # of the step: what is far from its best is far from quadratic, too
TRIED = 8  # sequences of `select` that tell the best length: what they tell apart wrongly differs by little
_SPREAD = 0.5  # of the factors about 1, before anything is known: what hardly matters stays as it is
_RIDGE = 1e-3  # of each factor's information: those that only act together have none of their own
_TOLD, _MOST_TOLD = 0.05, 8  # a factor that is further from 1 is told, of so many at most

Factors = Mapping[int, Tensor]  # layer → one factor a piece, (m,)
Logits = Callable[[Factors, Batch], Tensor]


@dataclass(frozen=True)
class Pieces:
    """A matrix in `count` pieces of one factor each, equal parts along dimension `dim` of the weight as stored."""

    name: str
    count: int = 1
    dim: int = 0


@dataclass(frozen=True)
class Slopes:
    """What the batches say of some factors: (n, m) each, one row a batch.

    gradients: of the mean loss. drawn: of the summed loss on labels that the model drew, by the square root of the
    number of tokens, so that the mean of their outer products is the information of one token. num_tokens: of all.
    """

    gradients: Tensor
    drawn: Tensor
    num_tokens: int

    def mixed(self, mixing: Tensor) -> Slopes:
        """Of factors that stand for several of these: mixing (m, fewer)."""
        return Slopes(self.gradients @ mixing, self.drawn @ mixing, self.num_tokens)


def references(layer: int, plan: Plan) -> Iterator[Reference]:
    """The block and its MLP by matrix, and its attention by head, in the layer's own precision."""
    for part in (None, *SUBLAYERS) if plan.has_sublayers(layer) else (None,):
        yield Reference("rescale", layer, layer, part, None, None, plan.layer_bits[layer])


def pieces_of(maps: Sequence[LinearMap], attention: Sequence[str], head_dim: int) -> list[Pieces]:
    """The matrices of a block, those named in `attention` by head: rows of what enters it, columns of its last one."""
    found = []
    for m in maps:
        rows, columns = m.oriented().shape[-2:]
        width = columns if attention and m.name == attention[-1] else rows
        is_split = m.name in attention and m.weight.ndim == 2 and head_dim > 0 and width % head_dim == 0
        along = int((m.name != attention[-1]) == m.transposed) if is_split else 0
        found.append(Pieces(m.name, width // head_dim, along) if is_split else Pieces(m.name))
    return found


def by_matrix(pieces: Sequence[Pieces]) -> Tensor:
    """What mixes the factors of the pieces into one a matrix: (m, number of matrices)."""
    mixing: Tensor = torch.block_diag(*(torch.ones(p.count, 1, dtype=torch.float64) for p in pieces))
    return mixing


def of_matrices(pieces: Sequence[Pieces], names: Sequence[str]) -> Tensor:
    """What picks the factors of some matrices out of all: (m, fewer)."""
    wanted = [p.name in names for p in pieces for _ in range(p.count)]
    return torch.eye(len(wanted), dtype=torch.float64)[:, torch.tensor(wanted)]


def slopes(
    logits: Logits, sizes: Mapping[int, int], data: Data, batch_size: int, seed: int, *, at_once: bool
) -> dict[int, Slopes]:
    """What `data` says of every layer's factors, each layer as if it alone were changed; all share the passes.

    logits: next-token logits (n_seq, seq_len, vocab) of a batch with the factors in place. sizes: how many each layer
    has. batch_size: sequences that are run at once, at most. at_once: as `in_parallel` has it.
    """
    size = max(1, min(batch_size, len(data) // BATCHES))
    batches = (data.batch(range(at, min(at + size, len(data)))) for at in range(0, len(data), size))

    def one(item: tuple[int, Batch]) -> tuple[Tensor, Tensor]:
        number, batch = item
        with torch.enable_grad():
            factors = {n: torch.ones(count, requires_grad=True) for n, count in sizes.items()}
            scores = logits(factors, batch)[:, :-1].float().flatten(0, 1)
            generator = torch.Generator(scores.device).manual_seed(seed + number)
            labels = torch.multinomial(scores.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(scores, batch.ids[:, 1:].flatten().to(scores.device))
            drawn = nn.functional.cross_entropy(scores, labels, reduction="sum") * len(labels) ** -0.5
            leaves = list(factors.values())
            first = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
            second = torch.autograd.grad(drawn, leaves, materialize_grads=True)
        return torch.cat(first).double(), torch.cat(second).double()

    found = list(in_parallel(one, enumerate(batches), at_once=at_once))
    gradients, drawn = (torch.stack(rows).split(list(sizes.values()), 1) for rows in zip(*found, strict=True))
    num_tokens = len(data) * (data.batch(range(1)).ids.shape[1] - 1)
    return {n: Slopes(g, d, num_tokens) for n, g, d in zip(sizes, gradients, drawn, strict=True)}


def newton_step(found: Slopes) -> Tensor:
    """δ (m,). Where there are few batches for so many factors what is seen of their interplay counts the less."""
    n, m = found.drawn.shape
    information = found.drawn.T @ found.drawn / n
    own = information.diagonal()
    information = torch.diag(own) + (information - torch.diag(own)) * n / (n + m)
    ridge = torch.diag(_RIDGE * own + 1.0 / (_SPREAD**2 * found.num_tokens))
    step: Tensor = -torch.linalg.solve(information + ridge, found.gradients.mean(0))
    return step.clamp(-FARTHEST, FARTHEST).float()


def best_length(loss: Callable[[Tensor], float], step: Tensor) -> Tensor:
    """The factors 1 + t δ, of the length t that has the least loss."""
    return min((1.0 + t * step for t in LENGTHS), key=loss)


def rescaled(weights: Mapping[str, Tensor], pieces: Sequence[Pieces], factors: Tensor) -> dict[str, Tensor]:
    """The matrices in pieces, each piece times its factor."""
    return {name: s.weight(weights[name]) for name, s in _scalings(pieces, factors).items()}


def _scalings(pieces: Sequence[Pieces], factors: Tensor) -> dict[str, Scaling]:
    each = factors.split([p.count for p in pieces])
    return {p.name: Scaling(f, p.dim) for p, f in zip(pieces, each, strict=True)}


def kept(pieces: Sequence[Pieces], factors: Tensor, seconds: float) -> tuple[Replacement, FitOutcome]:
    """What is kept of a fit: the factors, and the same in words."""
    replacement = Replacement(scaled=_scalings(pieces, factors))
    return replacement, FitOutcome("trained", 1, True, told(pieces, factors), None, None, round(seconds, 3))


def told(pieces: Sequence[Pieces], factors: Tensor) -> str:
    """The factors in words, such as "q_proj × 0.71, o_proj head 3 × 1.12"; the farthest from 1 first."""
    labels = [
        _short(p.name) + (f" head {i}" if p.count > 1 else "") for p in pieces for i in range(1, p.count + 1)
    ]
    pairs = sorted(zip(labels, factors.tolist(), strict=True), key=lambda pair: -abs(pair[1] - 1.0))
    far = [f"{label} × {factor:.2f}" for label, factor in pairs if abs(factor - 1.0) > _TOLD]
    more = [f"{len(far) - _MOST_TOLD} more"] if len(far) > _MOST_TOLD else []
    return ", ".join([*far[:_MOST_TOLD], *more]) or "every factor within 5% of 1"


def _short(name: str) -> str:
    parts = [p for p in name.split(".") if p != "weight"]
    return parts[-1] if parts else name
