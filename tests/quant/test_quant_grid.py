"""Weights on a grid are recognised, in every dtype and grouping; random weights never are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peelcli.errors import CheckpointError, UsageError
from peelcli.quant.fake_quantize import fake_quantize
from peelcli.quant.grid import Grid, recognise_grid
from peelcli.quant.initial_scale import initial_scale
from peelcli.quant.schemes import SCHEMES
from peelcli.records.quant_spec import QuantSpec

LOW_BIT = [name for name, scheme in SCHEMES.items() if not (scheme.is_free or scheme.is_codebook)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def quantised(name: str, shape: tuple[int, ...], group_size: int | None = None) -> torch.Tensor:
    weight = torch.randn(shape) * 0.02 * (0.5 + torch.rand(*shape[:-1], 1))
    scale = initial_scale(weight, QuantSpec(name, group_size))
    return fake_quantize(weight, scale, QuantSpec(name, group_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 128, 64, 32])
@pytest.mark.parametrize("name", LOW_BIT)
def test_every_scheme_is_recognised(name, group_size, dtype):
    weight = quantised(name, (300, 384), group_size).to(dtype)
    assert recognise_grid(weight) == Grid(QuantSpec(name, group_size), SCHEMES[name].num_bits)


@pytest.mark.parametrize("name", LOW_BIT)
def test_short_last_groups_and_stacked_experts(name):
    assert recognise_grid(quantised(name, (64, 150), 64)) == Grid(QuantSpec(name, 64), SCHEMES[name].num_bits)
    assert recognise_grid(quantised(name, (3, 32, 96))) == Grid(QuantSpec(name), SCHEMES[name].num_bits)


@pytest.mark.parametrize("name", LOW_BIT)
def test_one_step_for_the_whole_tensor_is_a_case_of_channels(name):
    weight = torch.randn(64, 256)
    step = initial_scale(weight.reshape(1, -1), QuantSpec(name))
    weight = fake_quantize(weight, step.expand(64, 1), QuantSpec(name))
    assert recognise_grid(weight) == Grid(QuantSpec(name), SCHEMES[name].num_bits)


@pytest.mark.parametrize(
    ("levels", "name"),
    [
        ((-3, -1, 1, 3), "int2"),  # zero half-way between two levels
        ((0, 1, 2, 3), "int2"),  # an asymmetric zero point
        ((-7, -5, -3, -1, 1, 3, 5, 7), "int3"),
        (tuple(range(-7, 9)), "int4"),  # a negative scale
        (tuple(range(-3, 13)), "int4"),
        (tuple(range(-10, 11)), "int5"),
        (tuple(range(-20, 12)), "int5"),
        (tuple(range(-31, 32)), "int6"),
        (tuple(range(-63, 65)), "int7"),
        (tuple(range(-70, 71)), "int8"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_equally_spaced_levels(levels, name, dtype):
    codes = torch.tensor(levels, dtype=torch.float32)[torch.randint(len(levels), (64, 256))]
    weight = codes * torch.rand(64, 1).add(0.1)
    assert recognise_grid(weight.to(dtype)) == Grid(QuantSpec(name), SCHEMES[name].num_bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_values", [8, 16, 32])
@pytest.mark.parametrize("group_size", [None, 64])
def test_a_codebook_that_is_not_equally_spaced_is_no_grid(num_values, group_size, dtype):
    # quantiles of the normal distribution, as in NF4
    codebook = torch.special.ndtri((torch.arange(num_values) + 0.5) / num_values)
    weight = codebook[torch.randint(num_values, (64, 256))]
    step = torch.rand(64, 256 // (group_size or 256)).add(0.1)
    weight = weight * step.repeat_interleave(group_size or 256, dim=-1)
    assert recognise_grid(weight.to(dtype)) is None


def test_a_little_noise_is_forgiven_and_more_is_not():
    codes = torch.randint(-8, 8, (64, 256)).float()
    noise = torch.where(codes == 0, 0.0, torch.rand(64, 256) * 2 - 1)
    assert recognise_grid((codes + 0.008 * noise) * 0.3) == Grid(QuantSpec("int4"), 4.0)
    assert recognise_grid((codes + 0.1 * noise) * 0.3) is None


def test_one_channel_off_the_grid_is_enough():
    weight = quantised("ternary", (2000, 64))
    weight[1234] = torch.randn(64) * 0.02
    assert recognise_grid(weight) is None


def test_a_short_last_group_off_the_grid_is_enough():
    weight = quantised("int4", (64, 150), 64)
    weight[:, 128:] = torch.randn(64, 22) * 0.02
    assert recognise_grid(weight) is None


def test_small_values_beside_equal_outliers_do_not_pass_for_zeros():
    weight = torch.randn(64, 256) * 1e-4
    weight[:, ::16] = torch.randn(64, 16).sign()
    assert recognise_grid(weight) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 64), (64, 512), (8, 4096), (2, 16, 128)])
@pytest.mark.parametrize("kind", ["gaussian", "uniform", "heavy", "sparse"])
def test_random_weights_are_not_recognised(kind, shape, dtype):
    gaussian = torch.randn(shape)
    weight = {
        "gaussian": gaussian,
        "uniform": torch.rand(shape) * 2 - 1,
        "heavy": gaussian / torch.randn(shape).abs().clamp_min(1e-3),
        "sparse": gaussian * (torch.rand(shape) < 0.1),
    }[kind]
    assert recognise_grid((weight * 0.02).to(dtype)) is None


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 400), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_short_rows_of_random_weights_are_not_recognised(d_out, d_in, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator) * 0.02
    assert recognise_grid(weight.to(dtype), (None, 32, 16, 4)) is None


@pytest.mark.parametrize("d_in", [1, 2, 3, 4, 5])
def test_very_many_or_very_few_values_of_very_short_rows_prove_nothing(d_in):
    assert recognise_grid(torch.randn(4000, d_in)) is None
    singles = torch.randn(500, 1, d_in)
    assert not any(recognise_grid(weight) for weight in singles)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(64, 64),
        torch.full((64, 64), 0.3),
        torch.randn(64, 1).expand(64, 64),
        torch.tensor([[0.3, -0.3, -0.3, 0.3]]),
        torch.eye(64),
        torch.eye(64) - torch.eye(64).roll(1, 0),
        torch.full((64, 64), float("nan")),
        torch.full((64, 64), float("inf")),
    ],
    ids=["zero", "constant", "constant rows", "four values", "identity", "differences", "nan", "inf"],
)
def test_degenerate_weights_are_not_recognised(weight):
    assert recognise_grid(weight) is None


def test_one_nan_among_ternary_weights_is_not_recognised():
    weight = quantised("ternary", (64, 64))
    weight[17, 3] = float("nan")
    assert recognise_grid(weight) is None


def test_zero_rows_do_not_hide_a_grid():
    weight = quantised("ternary", (64, 256))
    weight[::2] = 0.0
    assert recognise_grid(weight) == Grid(QuantSpec("ternary"), SCHEMES["ternary"].num_bits)


def test_only_the_groupings_asked_for_are_tried():
    weight = quantised("int4", (64, 256), 64)
    assert recognise_grid(weight, (None, 128)) is None
    assert recognise_grid(weight, (64,)) == Grid(QuantSpec("int4", 64), 4.0)
    assert recognise_grid(weight[:, :64], (64,)) == Grid(
        QuantSpec("int4"), 4.0
    )  # one group: the whole channel


def test_what_is_no_linear_weight_is_refused():
    with pytest.raises(CheckpointError, match=r"\(64,\)"):
        recognise_grid(torch.ones(64))
    with pytest.raises(UsageError, match="found 0"):
        recognise_grid(torch.randn(4, 8), (0,))
