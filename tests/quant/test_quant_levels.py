"""Codes and levels: there and back again, and the nearest level is that of the format's own hardware type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peelcli.quant.levels import codes_of, level_table, levels_of, nearest_levels
from peelcli.quant.schemes import SCHEMES

LOW_BIT = [name for name, scheme in SCHEMES.items() if not scheme.is_free]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOW_BIT)
def test_every_code_comes_back(name, dtype):
    scheme = SCHEMES[name]
    codes = torch.tensor(scheme.codes, dtype=torch.int8).flip(0).reshape(-1, 1)
    levels = levels_of(codes, scheme, dtype)
    assert torch.equal(levels.flatten().flip(0), level_table(scheme, levels))
    assert torch.equal(codes_of(levels, scheme), codes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LOW_BIT), st.sampled_from([0.3, 1.0, 30.0, 600.0]), st.integers(0, 2**31))
def test_no_level_is_nearer_and_levels_are_their_own_nearest(name, spread, seed):
    scheme = SCHEMES[name]
    ratio = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    table = level_table(scheme, ratio)
    found = nearest_levels(ratio, scheme)
    assert torch.equal((ratio - found).abs(), (ratio[:, None] - table).abs().amin(-1))
    assert torch.equal(nearest_levels(found, scheme), found)


def test_fp8_rounds_as_torch_does_but_half_way_between_two():
    ratio = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 100
    ratio = torch.cat([ratio, ratio * 1e-4]).clamp(-448, 448)
    expected = ratio.to(torch.float8_e4m3fn).float()
    assert torch.equal(nearest_levels(ratio, SCHEMES["fp8_e4m3"]), expected)
