"""Packing loses nothing, takes exactly the room it says, and refuses what is not its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peelcli.errors import ArtefactError, UsageError
from peelcli.quant.packing import pack, packed_nbytes, unpack
from peelcli.quant.schemes import SCHEMES

LOW_BIT = [name for name, scheme in SCHEMES.items() if not scheme.is_free]
shapes = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)


def random_codes(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    levels = torch.tensor(SCHEMES[name].codes, dtype=torch.int8)
    generator = torch.Generator().manual_seed(seed)
    return levels[torch.randint(len(levels), shape, generator=generator)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(LOW_BIT), shapes, st.integers(0, 2**31))
def test_round_trip_at_true_size(name, shape, seed):
    scheme, codes = SCHEMES[name], random_codes(name, shape, seed)
    packed = pack(codes, scheme)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_nbytes(codes.numel(), scheme),)
    back = unpack(packed, scheme, shape)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


@pytest.mark.parametrize("name", ["int3", "int8", "ternary", "nf4", "fp8_e4m3"])
def test_round_trip_in_several_parts(name):
    codes = random_codes(name, (3, 2**20 // 2 + 5))
    assert torch.equal(unpack(pack(codes, SCHEMES[name]), SCHEMES[name], codes.shape), codes)


@pytest.mark.parametrize(
    ("name", "codes", "nbytes"),
    [
        ("binary", 8, 1),
        ("ternary", 5, 1),
        ("int2", 4, 1),
        ("int3", 8, 3),
        ("int4", 2, 1),
        ("int5", 8, 5),
        ("int6", 4, 3),
        ("int7", 8, 7),
        ("int8", 1, 1),
    ],
)
def test_codes_per_byte(name, codes, nbytes):
    scheme = SCHEMES[name]
    assert packed_nbytes(codes, scheme) == nbytes
    assert packed_nbytes(codes + 1, scheme) == nbytes + 1
    assert packed_nbytes(0, scheme) == 0
    assert 8 * packed_nbytes(10**6, scheme) / 10**6 == pytest.approx(scheme.num_bits, rel=0.01)


def test_the_layout_on_disk_does_not_change():
    def packed(name, *codes):
        return pack(torch.tensor(codes, dtype=torch.int8), SCHEMES[name]).tolist()

    assert packed("binary", 1, -1, -1, 1) == [0b1001]
    assert packed("ternary", 1, 0, -1, -1, 1, 0) == [2 + 3 + 2 * 81, 1]
    assert packed("int2", -2, -1, 0, 1) == [0b11_10_01_00]
    assert packed("int3", -4, 3, 0) == [0b00_111_000, 0b1]
    assert packed("int4", -8, 7) == [0xF0]
    assert packed("int5", -16, 15) == [0b111_00000, 0b11]
    assert packed("int6", -32, 31) == [0b11_000000, 0b1111]
    assert packed("int7", 63, -64) == [0b01111111, 0]
    assert packed("int8", -128, 0, 127) == [0, 128, 255]
    assert packed("nf4", -7, 8) == [0xF0]
    assert packed("fp8_e4m3", -126, 0, 126) == [0, 126, 252]


@pytest.mark.parametrize("name", LOW_BIT)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_length_is_refused(name, change):
    shape = (7, 9)
    nbytes = packed_nbytes(math.prod(shape), SCHEMES[name])
    message = rf"{name}.*\({nbytes},\).*\(7, 9\).*found \({nbytes + change},\)"
    with pytest.raises(ArtefactError, match=message):
        unpack(torch.zeros(nbytes + change, dtype=torch.uint8), SCHEMES[name], shape)


def test_other_dtypes_and_bytes_that_no_codes_give_are_refused():
    with pytest.raises(ArtefactError, match="int32"):
        unpack(torch.zeros(1, dtype=torch.int32), SCHEMES["int4"], (2,))
    with pytest.raises(ArtefactError, match="below 243, found 250"):
        unpack(torch.tensor([250], dtype=torch.uint8), SCHEMES["ternary"], (5,))
    with pytest.raises(ArtefactError, match="below 253, found 253"):
        unpack(torch.tensor([253], dtype=torch.uint8), SCHEMES["fp8_e4m3"], (1,))


@pytest.mark.parametrize(
    ("name", "code"),
    [("binary", 0), ("ternary", 2), ("int3", 4), ("int4", -9), ("nf4", -8), ("fp8_e4m3", 127)],
)
def test_codes_of_another_scheme_are_refused(name, code):
    with pytest.raises(UsageError, match=name):
        pack(torch.tensor([1, -1, code], dtype=torch.int8), SCHEMES[name])


def test_free_weights_have_nothing_to_pack():
    for call in (
        lambda: pack(torch.zeros(2, dtype=torch.int8), SCHEMES["fp"]),
        lambda: unpack(torch.zeros(2, dtype=torch.uint8), SCHEMES["fp"], (2,)),
        lambda: packed_nbytes(2, SCHEMES["fp"]),
    ):
        with pytest.raises(UsageError, match="fp"):
            call()
