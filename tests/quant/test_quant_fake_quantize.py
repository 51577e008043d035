"""Laws of quantise, dequantise and the straight-through version: membership, projection, slopes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peelcli.errors import ArtefactError, CheckpointError, UsageError
from peelcli.quant.fake_quantize import dequantize, fake_quantize, quantize
from peelcli.quant.initial_scale import initial_scale
from peelcli.quant.schemes import SCHEMES, Scheme
from peelcli.records.quant_spec import QuantSpec

LOW_BIT = [name for name, scheme in SCHEMES.items() if not scheme.is_free]
low_bit = st.sampled_from(LOW_BIT).map(SCHEMES.__getitem__)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
group_sizes = st.sampled_from([None, 1, 3, 8, 50])


@st.composite
def weights(draw) -> torch.Tensor:
    shape = draw(st.sampled_from([(1, 1), (3, 8), (5, 13), (2, 3, 8), (2, 2, 7)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-4, 0.02, 1.0, 300.0]))
    if draw(st.booleans()):
        weight[..., 0, :] = 0.0
    return weight.to(draw(dtypes))


def groups_of(tensor: torch.Tensor, group_size: int | None) -> list[torch.Tensor]:
    rows = tensor.reshape(-1, tensor.shape[-1])
    return [group for row in rows for group in row.split(group_size or row.shape[0])]


@settings(max_examples=80, deadline=None)
@given(weights(), low_bit, group_sizes)
def test_every_weight_is_a_scheme_member(weight, scheme, group_size):
    scale = initial_scale(weight, QuantSpec(scheme.name, group_size))
    out = fake_quantize(weight, scale, QuantSpec(scheme.name, group_size))
    assert out.shape == weight.shape
    assert out.dtype == weight.dtype
    for group, step in zip(groups_of(out, group_size), scale.reshape(-1), strict=True):
        members = (torch.tensor(scheme.levels, dtype=step.dtype) * step).to(weight.dtype)
        assert torch.isin(group, members).all()


@settings(max_examples=80, deadline=None)
@given(weights(), low_bit, group_sizes)
def test_the_straight_through_value_is_exactly_the_dequantised_one(weight, scheme, group_size):
    scale = (
        initial_scale(weight, QuantSpec(scheme.name, group_size)) * 0.8
    )  # so that some weights are clipped
    codes = quantize(weight, scale, QuantSpec(scheme.name, group_size))
    assert codes.dtype == torch.int8
    out = fake_quantize(weight.requires_grad_(), scale.requires_grad_(), QuantSpec(scheme.name, group_size))
    assert torch.equal(out, dequantize(codes, scale, QuantSpec(scheme.name, group_size), weight.dtype))


@settings(max_examples=80, deadline=None)
@given(weights(), low_bit, group_sizes)
def test_scheme_members_stay_what_they_are(weight, scheme, group_size):
    scale = initial_scale(weight, QuantSpec(scheme.name, group_size))
    once = fake_quantize(weight, scale, QuantSpec(scheme.name, group_size))
    assert torch.equal(fake_quantize(once, scale, QuantSpec(scheme.name, group_size)), once)


@settings(max_examples=60, deadline=None)
@given(weights(), low_bit, group_sizes)
def test_no_other_level_is_nearer(weight, scheme, group_size):
    weight = weight.double()
    scale = initial_scale(weight, QuantSpec(scheme.name, group_size))
    out = fake_quantize(weight, scale, QuantSpec(scheme.name, group_size))
    levels = torch.tensor(scheme.levels, dtype=torch.float64)
    triples = zip(groups_of(weight, group_size), groups_of(out, group_size), scale.reshape(-1), strict=True)
    for group, quantised, step in triples:
        nearest = (group[:, None] - levels * step).abs().amin(-1)
        torch.testing.assert_close((group - quantised).abs(), nearest, rtol=1e-9, atol=1e-9)


def by_autograd(weight: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The specification of the slopes: the nearest level straight through, clipped half a gap beyond the last."""
    if scheme.name == "binary":
        return torch.where(weight >= 0, 1.0, -1.0) * scale + (weight - weight.detach())
    ratio = weight / scale
    levels = torch.tensor(scheme.levels, dtype=ratio.dtype)
    low, high = (levels[0] * 3 - levels[1]) / 2, (levels[-1] * 3 - levels[-2]) / 2
    level = levels[(ratio.unsqueeze(-1) - levels).abs().argmin(-1)].detach()
    straight = ratio + (level - ratio).detach()
    return torch.where((ratio >= low) & (ratio <= high), straight, level) * scale


@pytest.mark.parametrize("name", LOW_BIT)
@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_gradients_are_those_of_the_round_straight_through_trick(name, shrink):
    torch.manual_seed(0)
    scheme = SCHEMES[name]
    weight = torch.randn(6, 40, dtype=torch.float64, requires_grad=True)
    scale = (initial_scale(weight, QuantSpec(scheme.name)) * shrink).requires_grad_()
    upstream = torch.randn(6, 40, dtype=torch.float64)
    got = torch.autograd.grad(fake_quantize(weight, scale, QuantSpec(scheme.name)), (weight, scale), upstream)
    expected = torch.autograd.grad(by_autograd(weight, scale, scheme), (weight, scale), upstream)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    clipped = int((got[0] == 0).sum())
    if name == "binary":
        assert clipped == 0
    elif shrink < 1:
        assert clipped > 0
    assert torch.equal(got[0][got[0] != 0], upstream[got[0] != 0])  # straight through: times one


def test_scale_gradient_sums_over_its_own_group():
    weight = torch.tensor([[0.9, -1.1, 0.2, 5.0, -0.7]], requires_grad=True)
    scale = torch.tensor([[1.0, 2.0]], requires_grad=True)
    fake_quantize(weight, scale, QuantSpec("ternary", 3)).sum().backward()
    # group 1: (1 − .9) + (−1 + 1.1) + (0 − .2); group 2: 5 / 2 is beyond 1.5, so 1, and (0 + .35)
    torch.testing.assert_close(scale.grad, torch.tensor([[0.0, 1.35]]))
    assert weight.grad.tolist() == [[1, 1, 1, 0, 1]]


@pytest.mark.parametrize("name", [name for name in LOW_BIT if name != "binary"])
def test_weights_on_the_outermost_levels_still_learn(name):
    scheme = SCHEMES[name]
    scale = torch.tensor([[0.1], [0.3], [0.7]])
    weight = (
        scale * torch.tensor([float(scheme.levels[0]), float(scheme.levels[-1])]) * (1 + 1e-6)
    ).requires_grad_()
    fake_quantize(weight, scale, QuantSpec(scheme.name)).sum().backward()
    assert (weight.grad == 1).all()


@pytest.mark.parametrize("name", LOW_BIT)
def test_rows_of_zeros_and_scales_of_zero_give_zeros_and_finite_gradients(name):
    weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]], requires_grad=True)
    scheme = SCHEMES[name]
    assert initial_scale(weight, QuantSpec(scheme.name))[0].tolist() == [0.0]
    scale = torch.zeros(2, 1, requires_grad=True)
    out = fake_quantize(weight, scale, QuantSpec(scheme.name))
    out.sum().backward()
    assert (out == 0).all()
    assert torch.isfinite(weight.grad).all()
    assert torch.isfinite(scale.grad).all()
    codes = quantize(weight, scale, QuantSpec(scheme.name))
    if name == "binary":
        assert codes.tolist() == [[1, 1], [1, -1]]
    else:
        assert codes.tolist() == [[0, 0], [0, 0]]
        assert scale.grad.tolist() == [[0], [0]]


@pytest.mark.parametrize("name", LOW_BIT)
@pytest.mark.parametrize("tiny", [1e-20, 1e-38, 1e-44])
def test_tiny_scales_keep_gradients_finite(name, tiny):
    weight = torch.tensor([[1.0, -2.0, tiny]], requires_grad=True)
    scale = torch.full((1, 1), tiny, requires_grad=True)
    fake_quantize(weight, scale, QuantSpec(name)).sum().backward()
    assert torch.isfinite(weight.grad).all()
    assert torch.isfinite(scale.grad).all()


@pytest.mark.parametrize("name", LOW_BIT)
def test_values_that_are_not_finite_do_not_vanish(name):
    scheme = SCHEMES[name]
    weight = torch.tensor([[1.0, float("nan"), float("inf")]])
    scale = torch.ones(1, 1)
    assert torch.isnan(fake_quantize(weight, scale, QuantSpec(scheme.name))).tolist() == [[False, True, True]]
    for call in (
        lambda: quantize(weight, scale, QuantSpec(scheme.name)),
        lambda: initial_scale(weight, QuantSpec(scheme.name)),
    ):
        with pytest.raises(CheckpointError, match="2 of 3 NaN or infinite"):
            call()


@pytest.mark.parametrize("group_size", [None, 3])
def test_free_weights_pass_through_untouched(group_size):
    scheme = SCHEMES["fp"]
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    scale = initial_scale(weight, QuantSpec(scheme.name, group_size))
    assert fake_quantize(weight, scale, QuantSpec(scheme.name, group_size)) is weight
    codes = quantize(weight, scale, QuantSpec(scheme.name, group_size))
    assert torch.equal(dequantize(codes, scale, QuantSpec(scheme.name, group_size), weight.dtype), weight)


def test_what_does_not_fit_is_named():
    ternary = SCHEMES["ternary"]
    weight = torch.randn(4, 8)
    with pytest.raises(CheckpointError, match=r"\(8,\)"):
        initial_scale(torch.randn(8), QuantSpec(ternary.name))
    with pytest.raises(CheckpointError, match="int64"):
        initial_scale(torch.ones(4, 8, dtype=torch.long), QuantSpec(ternary.name))
    with pytest.raises(UsageError, match="at least 1.*found 0"):
        initial_scale(weight, QuantSpec(ternary.name, 0))
    with pytest.raises(ArtefactError, match=r"\(4, 2\).*found \(4, 1\)"):
        fake_quantize(weight, torch.ones(4, 1), QuantSpec(ternary.name, 4))
    with pytest.raises(ArtefactError, match=r"\(4, 1\).*found \(8, 1\)"):
        dequantize(torch.ones(4, 8, dtype=torch.int8), torch.ones(8, 1), QuantSpec(ternary.name))
