"""Laws of the rescale: it finds the factors that were lost, moves nothing that is settled, and keeps what is idle."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peelcli.errors import ArtefactError
from peelcli.references.interface import Batch, LinearMap
from peelcli.references.rescale import (
    FARTHEST,
    LENGTHS,
    Factors,
    Pieces,
    Slopes,
    best_length,
    by_matrix,
    kept,
    newton_step,
    of_matrices,
    pieces_of,
    rescaled,
    slopes,
    told,
)

D_MODEL, VOCAB, ROWS, LENGTH = 6, 5, 128, 33
DIRECTIONS = torch.randn(2, D_MODEL, VOCAB, generator=torch.Generator().manual_seed(0))


class Text:
    """Inputs (n, LENGTH, D_MODEL), and next tokens drawn from the softmax of both matrices' sum."""

    def __init__(self, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(ROWS, LENGTH, D_MODEL, generator=generator)
        p = (self.inputs @ DIRECTIONS.sum(0)).softmax(-1)[:, :-1]
        following = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(ROWS, -1)
        self.ids = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), following], 1)

    def __len__(self) -> int:
        return ROWS

    def batch(self, rows: Sequence[int]) -> Batch:
        chosen = list(rows)
        return Batch(self.ids[chosen], self.inputs[chosen], self.inputs[chosen])


def steps_for(lengths: Sequence[float], *, at_once: bool = False) -> Tensor:
    """δ where the two matrices are at `lengths` of what the text was drawn from."""

    def logits(factors: Factors, batch: Batch) -> Tensor:
        both = zip(DIRECTIONS, lengths, factors[3], strict=True)
        return torch.stack([batch.inputs @ (w * length * factor) for w, length, factor in both]).sum(0)

    return newton_step(slopes(logits, {3: 2}, Text(), 2, 0, at_once=at_once)[3])


@settings(max_examples=20, deadline=None)
@given(st.floats(0.85, 1.2), st.floats(0.85, 1.2))
def test_it_brings_lengths_that_are_off_nearer(one: float, other: float) -> None:
    """Both nearly right, up to what so little text can tell and what is not quadratic."""
    found = 1.0 + steps_for([one, other])
    missing = torch.tensor([one, other])
    left = (found * missing - 1.0).square().sum().sqrt()
    assert left < 0.15 + 0.5 * (missing - 1.0).square().sum().sqrt()


def test_what_is_far_off_is_brought_nearer_and_never_turned_round() -> None:
    step = steps_for([3.0, 1.0])
    assert -FARTHEST <= step[0] < -0.3
    assert steps_for([0.2, 1.0])[0] == FARTHEST


def test_threads_change_nothing() -> None:
    assert torch.equal(steps_for([1.3, 0.7]), steps_for([1.3, 0.7], at_once=True))


def test_what_has_no_say_in_the_loss_stays_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(64, 2, generator=generator) * torch.tensor([0.5, 1e-4])
    gradients = torch.randn(64, 2, generator=generator) * 1e-4
    assert newton_step(Slopes(gradients, drawn, 16_000)).abs().max() < 0.05


def test_more_factors_than_batches_give_no_wild_step() -> None:
    """What little is drawn says nothing of most directions; each factor's own information still holds them."""
    generator = torch.Generator().manual_seed(0)
    drawn, noise = (torch.randn(8, 100, generator=generator) for _ in range(2))
    assert newton_step(Slopes(0.1 * noise / 8**0.5, drawn, 16_000)).abs().max() < 0.3


def test_a_part_of_the_step_is_taken_where_the_whole_goes_too_far() -> None:
    step = torch.tensor([0.4, -0.4])
    for length in LENGTHS:
        best = 1.0 + length * step
        assert torch.equal(best_length(lambda f, b=best: float((f - b).square().sum()), step), best)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_attention_is_cut_by_head_and_all_else_is_whole(transposed: bool) -> None:
    shapes = {"attn.qkv": (12, 8), "attn.out": (8, 4), "mlp.up": (16, 8)}  # (d_out, d_in), heads of 2
    maps = [
        LinearMap(name, torch.ones(*(reversed(shape) if transposed else shape)), transposed)
        for name, shape in shapes.items()
    ]
    pieces = pieces_of(maps, ["attn.qkv", "attn.out"], 2)
    assert [p.count for p in pieces] == [6, 2, 1]
    factors = torch.arange(1.0, 10.0)
    found = rescaled({m.name: m.weight for m in maps}, pieces, factors)
    oriented = {name: w.T if transposed else w for name, w in found.items()}
    assert oriented["attn.qkv"][:, 0].tolist() == [f for f in range(1, 7) for _ in range(2)]
    assert oriented["attn.out"][0].tolist() == [7, 7, 8, 8]
    assert oriented["mlp.up"].unique().tolist() == [9]
    assert {m.name: found[m.name].shape for m in maps} == {m.name: m.weight.shape for m in maps}
    assert (factors[None].double() @ of_matrices(pieces, ["attn.out"])).tolist() == [[7, 8]]
    assert (torch.ones(1, 9).double() @ by_matrix(pieces)).tolist() == [[6, 2, 1]]


def test_without_a_head_dimension_every_matrix_is_whole() -> None:
    maps = [LinearMap("attn.q", torch.ones(9, 6), False)]
    assert pieces_of(maps, ["attn.q"], 0) == [Pieces("attn.q")]
    assert pieces_of(maps, ["attn.q"], 4) == [Pieces("attn.q")]
    assert pieces_of(maps, [], 3) == [Pieces("attn.q")]


def test_the_witness_is_the_matrices_times_their_factors() -> None:
    block = {"q.weight": torch.ones(2, 3), "o.weight": torch.ones(3, 2), "bias": torch.ones(3)}
    pieces = [Pieces("q.weight"), Pieces("o.weight", 2, 1)]
    replacement, outcome = kept(pieces, torch.tensor([0.5, 1.0, 2.0]), 1.0)
    like = torch.empty(0, dtype=torch.float64)
    found = replacement.weights(like, block)
    assert torch.equal(found["q.weight"], torch.full((2, 3), 0.5).double())
    assert torch.equal(found["o.weight"], torch.tensor([[1.0, 2.0]] * 3).double())
    assert set(found) == {"q.weight", "o.weight"}
    for other in (None, {}, block | {"o.weight": torch.ones(3, 3)}, block | {"o.weight": torch.ones(2)}):
        with pytest.raises(ArtefactError, match="fit no matrix of this block"):
            replacement.weights(like, other)
    assert (outcome.start, outcome.reason) == ("trained", "o head 2 × 2.00, q × 0.50")


def test_factors_are_told_the_farthest_first() -> None:
    pieces = [Pieces("attn.q_proj.weight", 2), Pieces("mlp.up_proj.weight"), Pieces("mlp.down_proj.weight")]
    found = told(pieces, torch.tensor([1.0, 0.9, 1.5, 1.01]))
    assert found == "up_proj × 1.50, q_proj head 2 × 0.90"
    assert told(pieces, torch.ones(4)) == "every factor within 5% of 1"
    assert told([Pieces("q", 12)], torch.full((12,), 2.0)).endswith("head 8 × 2.00, 4 more")
