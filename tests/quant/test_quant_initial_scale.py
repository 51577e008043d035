"""The initial scale is optimal where that is known, and never worse than the usual rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peelcli.errors import UsageError
from peelcli.quant.fake_quantize import dequantize, fake_quantize, quantize
from peelcli.quant.groups import split_groups
from peelcli.quant.initial_scale import SCALE_RULES, initial_scale, start_scale
from peelcli.quant.schemes import SCHEMES
from peelcli.records.quant_spec import QuantSpec

LOW_BIT = [name for name, scheme in SCHEMES.items() if not scheme.is_free]
INTEGERS = [name for name in LOW_BIT if name.startswith("int")]


@st.composite
def weights(draw) -> torch.Tensor:
    """Gaussian, heavy-tailed, skewed or sparse, at any magnitude, some rows zero."""
    shape = draw(st.sampled_from([(1, 1), (4, 20), (3, 37), (2, 3, 16)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = weight.sign() * weight.abs() ** draw(st.sampled_from([1, 3]))
    weight = weight + draw(st.sampled_from([0.0, 1.0]))
    weight = weight * (torch.rand(shape, generator=generator) < draw(st.sampled_from([1.0, 0.3])))
    weight = weight * draw(st.sampled_from([1e-25, 0.02, 1.0, 1e25]))
    return weight.to(draw(st.sampled_from([torch.float64, torch.float32])))


def squared_error(weight, scale, name, group_size):
    """Per group, relative to the square of its peak."""
    weight = weight.double()
    error = split_groups(
        fake_quantize(weight, scale.double(), QuantSpec(name, group_size)) - weight,
        QuantSpec(name, group_size),
    )[0]
    peak = split_groups(weight, QuantSpec("fp", group_size))[0].abs().amax(-1, keepdim=True).clamp_min(1e-300)
    return (error / peak).square().sum(-1)


@settings(max_examples=80, deadline=None)
@given(weights(), st.sampled_from(LOW_BIT), st.sampled_from([None, 5, 16]))
def test_never_worse_than_round_to_nearest_by_peak_or_mean(weight, name, group_size):
    scheme = SCHEMES[name]
    scale = initial_scale(weight, QuantSpec(scheme.name, group_size))
    groups, widths = split_groups(weight, QuantSpec("fp", group_size))
    own = squared_error(weight, scale, name, group_size)
    peak = groups.abs().amax(-1)
    for rule in (peak / scheme.levels[-1], peak / -scheme.levels[0], groups.abs().sum(-1) / widths):
        other = squared_error(weight, rule.reshape(scale.shape), name, group_size)
        assert (own <= other * (1 + 1e-5) + 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(weights(), st.sampled_from(["binary", "ternary"]), st.sampled_from([None, 5]))
def test_binary_and_ternary_scales_are_optimal(weight, name, group_size):
    scheme = SCHEMES[name]
    scale = initial_scale(weight, QuantSpec(scheme.name, group_size))
    own = squared_error(weight, scale, name, group_size)
    for factor in torch.linspace(0.05, 4, 160).tolist():
        assert (own <= squared_error(weight, scale * factor, name, group_size) + 1e-9).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_scales_are_near_the_best(name):
    torch.manual_seed(0)
    scheme = SCHEMES[name]
    weight = torch.randn(64, 32, dtype=torch.float64)
    scale = initial_scale(weight, QuantSpec(scheme.name))
    own = squared_error(weight, scale, name, None)
    factors = torch.linspace(0.3, 3, 1000).tolist()
    best = torch.stack([squared_error(weight, scale * factor, name, None) for factor in factors]).amin(0)
    # from int6 on there is no one best step: each row's error is a jagged function of it
    assert own.sum() <= best.sum() * (1.2 if scheme.num_bits > 5 else 1.03)
    peak_rule = weight.abs().amax(-1, keepdim=True) / scheme.qmax
    if scheme.num_bits <= 4:  # clipping pays where levels are few
        assert own.sum() < 0.9 * squared_error(weight, peak_rule, name, None).sum()


@pytest.mark.parametrize("name", ["binary", "ternary", "int2", "int3", "int4", "nf4", "int5"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_weights_on_a_grid_keep_it(name, group_size):
    torch.manual_seed(0)
    levels = torch.tensor(SCHEMES[name].levels, dtype=torch.float32)
    step = torch.rand(8, 96 // (group_size or 96)) + 0.1
    codes = levels[torch.randint(len(levels), (8, 96))]
    weight = codes * step.repeat_interleave(group_size or 96, dim=-1)
    scale = initial_scale(weight, QuantSpec(name, group_size))
    torch.testing.assert_close(scale, step)
    torch.testing.assert_close(fake_quantize(weight, scale, QuantSpec(name, group_size)), weight)


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int5"])
def test_a_grid_is_kept_whatever_part_of_it_a_group_uses(name):
    scheme = SCHEMES[name]
    for peak in range(1, scheme.qmax + 1):
        weight = 0.37 * torch.arange(-peak, peak + 1.0).unsqueeze(0)
        torch.testing.assert_close(
            fake_quantize(weight, initial_scale(weight, QuantSpec(scheme.name)), QuantSpec(scheme.name)),
            weight,
        )


def test_shapes_dtypes_and_the_short_last_group():
    ternary = SCHEMES["ternary"]
    assert initial_scale(torch.randn(4, 10).bfloat16(), QuantSpec(ternary.name, 4)).dtype == torch.float32
    assert initial_scale(torch.randn(4, 10).double(), QuantSpec(ternary.name, 4)).shape == (4, 3)
    assert initial_scale(torch.randn(2, 4, 10), QuantSpec(ternary.name)).shape == (2, 4, 1)
    weight = torch.tensor([[1.0, -3.0, 2.0, 4.0, 6.0]])
    assert initial_scale(weight, QuantSpec("binary", 3)).tolist() == [[2.0, 5.0]]


def test_the_search_in_parts_finds_what_one_row_at_a_time_finds():
    torch.manual_seed(0)
    weight = torch.randn(1100, 1000)  # more than one part
    whole = initial_scale(weight, QuantSpec("ternary"))
    rows = [initial_scale(weight[row : row + 1], QuantSpec("ternary")) for row in (0, 1047, 1048, 1049, 1099)]
    torch.testing.assert_close(whole[[0, 1047, 1048, 1049, 1099]], torch.cat(rows))


@settings(max_examples=40, deadline=None)
@given(weights(), st.sampled_from(LOW_BIT), st.sampled_from(SCALE_RULES))
def test_one_step_for_a_matrix_is_that_of_its_weights_in_a_row(weight, name, rule):
    if (name, rule) == ("nf4", "absmean"):
        return
    scheme, lead = SCHEMES[name], weight.shape[:-2]
    scale = start_scale(weight, QuantSpec(scheme.name, granularity="tensor", scale=rule))
    assert scale.shape == (*lead, 1, 1)
    flat = weight.reshape(*lead, 1, -1)
    assert torch.equal(scale, start_scale(flat, QuantSpec(scheme.name, granularity="channel", scale=rule)))
    codes = quantize(weight, scale, QuantSpec(scheme.name))
    assert torch.equal(codes.reshape(flat.shape), quantize(flat, scale, QuantSpec(scheme.name)))
    once = dequantize(codes, scale, QuantSpec(scheme.name), dtype=weight.dtype)
    assert torch.equal(fake_quantize(weight, scale, QuantSpec(scheme.name)), once)
    assert torch.equal(fake_quantize(once, scale, QuantSpec(scheme.name)), once)


@pytest.mark.parametrize("group_size", [None, 3])
def test_rules_are_what_they_say_and_the_least_squared_error_is_least(group_size):
    weight = torch.tensor([[0.5, -2.0, 1.0, 4.0], [0.0, 0.0, 0.0, -7.0]])
    widths = [4] if group_size is None else [3, 1]
    groups = [row.split(widths) for row in weight.abs()]
    for rule, expected in (("absmean", torch.mean), ("absmax", lambda g: g.max() / 7)):
        steps = torch.stack([torch.stack([expected(g) for g in row]) for row in groups])
        torch.testing.assert_close(start_scale(weight, QuantSpec("int4", group_size, scale=rule)), steps)
    errors = [
        squared_error(
            weight, start_scale(weight, QuantSpec("int4", group_size, scale=rule)), "int4", group_size
        )
        for rule in SCALE_RULES
    ]
    assert (errors[2] <= errors[0] + 1e-6).all()
    assert (errors[2] <= errors[1] + 1e-6).all()


def test_the_largest_weight_is_the_highest_level_of_a_codebook():
    weight = torch.tensor([[0.5, -0.25, 3.0]])
    for name in ("nf4", "fp8_e4m3"):
        scale = start_scale(weight, QuantSpec(name, scale="absmax"))
        assert quantize(weight, scale, QuantSpec(name))[0, 2] == SCHEMES[name].qmax
    with pytest.raises(UsageError, match="nf4.*absmax, mse, found 'absmean'"):
        start_scale(weight, QuantSpec("nf4", scale="absmean"))
    with pytest.raises(UsageError, match="absmean, absmax, mse, found 'median'"):
        start_scale(weight, QuantSpec("int4", scale="median"))
