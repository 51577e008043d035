"""The table of schemes: levels and bits are what their names say, and it is to be had without torch."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from peelcli.errors import UsageError
from peelcli.quant.schemes import SCHEMES, scheme_named

LOW_BIT = [scheme for scheme in SCHEMES.values() if not scheme.is_free]


@pytest.mark.parametrize("scheme", LOW_BIT, ids=lambda scheme: scheme.name)
def test_bits_are_the_logarithm_of_the_number_of_levels(scheme):
    unused = {"fp8_e4m3": 3}.get(scheme.name, 0)  # two NaN, and the other zero
    assert scheme.num_bits == pytest.approx(math.log2(len(scheme.levels) + unused))


@pytest.mark.parametrize("scheme", LOW_BIT, ids=lambda scheme: scheme.name)
def test_codes_count_levels_from_zero(scheme):
    assert list(scheme.levels) == sorted(set(scheme.levels))
    assert len(scheme.codes) == len(scheme.levels)
    assert (scheme.qmin, scheme.qmax) == (min(scheme.codes), max(scheme.codes))
    assert scheme.qmin >= -128
    assert scheme.qmax <= 127
    for code, level in zip(scheme.codes, scheme.levels, strict=True):
        assert (code > 0, code < 0) == (level > 0, level < 0)
        assert code == level or scheme.is_codebook
    low, high = scheme.reach
    assert low < scheme.levels[0]
    assert high > scheme.levels[-1]


def test_fp8_levels_are_the_numbers_of_the_format():
    import torch

    scheme = SCHEMES["fp8_e4m3"]
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert list(scheme.levels) == sorted(set(every[every.isfinite()].tolist()))
    sizes = [abs(level) for level in scheme.levels]
    assert sizes == every[torch.tensor(scheme.codes).abs()].tolist()


def test_nf4_levels_are_means_of_normal_quantiles():
    """QLoRA, equation 4, with one zero: 8 levels up and 7 down to an offset short of certainty, scaled to 1."""
    from statistics import NormalDist

    offset, inverse = (1 - 1 / 32 + 1 - 1 / 30) / 2, NormalDist().inv_cdf
    up = [inverse(0.5 + (offset - 0.5) * k / 8) for k in range(1, 9)]
    down = [-inverse(0.5 + (offset - 0.5) * k / 7) for k in range(7, 0, -1)]
    expected = [value / up[-1] for value in (*down, 0.0, *up)]
    assert SCHEMES["nf4"].levels == pytest.approx(expected, abs=1e-6)


def test_the_levels_of_the_small_schemes():
    assert {scheme.name: scheme.levels for scheme in LOW_BIT[:4]} == {
        "binary": (-1, 1),
        "ternary": (-1, 0, 1),
        "int2": (-2, -1, 0, 1),
        "int3": (-4, -3, -2, -1, 0, 1, 2, 3),
    }


def test_the_table_is_a_ladder_that_ends_in_free_weights():
    bits = [scheme.num_bits for scheme in SCHEMES.values()]
    assert bits == sorted(bits)
    assert SCHEMES["fp"].is_free
    assert SCHEMES["fp"].num_bits == 16


def test_schemes_are_found_by_name_and_a_wrong_name_lists_the_choices():
    for name in SCHEMES:
        assert scheme_named(name).name == name
    with pytest.raises(
        UsageError,
        match="binary, ternary, int2, int3, int4, nf4, int5, int6, int7, int8, fp8_e4m3, fp, found 'int9'",
    ):
        scheme_named("int9")


def test_free_weights_have_no_codes_to_ask_for():
    for bound in ("qmin", "qmax"):
        with pytest.raises(UsageError, match="fp"):
            getattr(SCHEMES["fp"], bound)


def test_the_table_imports_no_torch():
    code = "import sys, peelcli.quant.schemes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
