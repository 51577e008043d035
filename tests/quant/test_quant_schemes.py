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
    assert scheme.num_bits == pytest.approx(math.log2(len(scheme.levels)))
    assert (scheme.qmin, scheme.qmax) == (min(scheme.levels), max(scheme.levels))


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
        UsageError, match="binary, ternary, int2, int3, int4, int5, int6, int7, int8, fp.*'int9'"
    ):
        scheme_named("int9")


def test_free_weights_have_no_codes_to_ask_for():
    for bound in ("qmin", "qmax"):
        with pytest.raises(UsageError, match="fp"):
            getattr(SCHEMES["fp"], bound)


def test_the_table_imports_no_torch():
    code = "import sys, peelcli.quant.schemes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
