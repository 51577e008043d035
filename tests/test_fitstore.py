"""A witness that is read is the witness that was written, in every scheme, and takes the room that its bits ask for."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peelcli.quant.fake_quantize import quantize
from peelcli.quant.qparams import initial_qparams
from peelcli.quant.schemes import SCHEMES
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.interface import QuantizedMatrix, Replacement, Scaling
from peelcli.storage.hdf5 import open_plain
from peelcli.storage.replacement_weights import read_weights, replacing, write_weights

LOW_BIT = [name for name, scheme in SCHEMES.items() if not scheme.is_free]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(LOW_BIT),
    st.sampled_from([(3, 17), (2, 4, 9)]),
    st.sampled_from([(None, "tensor"), (None, "channel"), (4, "group")]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_witness_comes_back_bit_for_bit_at_its_true_size(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    shape: tuple[int, ...],
    shared: tuple[int | None, str],
    transposed: bool,
    symmetric: bool,
    seed: int,
) -> None:
    scheme, path = SCHEMES[name], Path(tmp_path_factory.mktemp("w")) / "witness.h5"
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    group_size, granularity = shared
    spec = QuantSpec(name, group_size, granularity, symmetric=symmetric or not name.startswith("int"))
    scale, zero = initial_qparams(weight, spec)
    codes = quantize(weight, scale, spec, zero)
    matrix = QuantizedMatrix(codes, scale, spec, transposed, zero)
    with replacing(path) as file:
        scaling = Scaling(weight.flatten()[:4], 1)
        replacement = Replacement({"m": matrix}, {"norm": weight[..., 0].bfloat16()}, {"own": scaling})
        write_weights(file.create_group("one"), replacement)
    with open_plain(path) as file:
        found = read_weights(file.root.group("one"))
    with h5py.File(path) as file:
        nbytes = file["one/weights/0/packed"].nbytes
    like = torch.empty(0)
    assert found.quantized["m"].spec.granularity == granularity
    assert torch.equal(found.quantized["m"].codes, codes)
    own = {"own": torch.randn(3, 8)}
    assert torch.equal(found.weights(like, own)["m"], matrix.weight(like))
    assert torch.equal(found.weights(like, own)["own"], scaling.weight(own["own"]))
    assert torch.equal(found.plain["norm"], weight[..., 0].bfloat16())
    bits = 8 / 5 if name == "ternary" else scheme.num_bits
    assert nbytes < codes.numel() * bits / 8 + 1
