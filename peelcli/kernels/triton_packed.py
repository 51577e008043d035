"""`quant.packed.packed_matmul` for CUDA: codes come out of their bytes in the kernel; the weight is never written out.

It serves few inputs at a time, where reading the weight is what takes the time. With many, as in a sweep over a
thousand tokens, the product itself does, and cuBLAS has no equal: there the weight is unpacked once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILES = {"BLOCK_N": 16, "BLOCK_OUT": 32, "BLOCK_IN": 64}


@triton.jit
def _codes(packed, nbytes, index, inside, low, BITS: tl.constexpr):
    """Codes of the elements `index` of a packed weight (`quant.packing`); BITS 0: ternary, five a byte."""
    if BITS == 0:
        byte = tl.load(packed + index // 5, mask=inside, other=0).to(tl.int32)
        place = (index % 5).to(tl.int32)
        power = tl.where(
            place == 0, 1, tl.where(place == 1, 3, tl.where(place == 2, 9, tl.where(place == 3, 27, 81)))
        )
        return ((byte // power) % 3 - 1).to(tl.float32)
    bit = index * BITS
    first = tl.load(packed + bit // 8, mask=inside, other=0).to(tl.int32)
    # A code of three bits may end in the next byte.
    second = tl.load(packed + bit // 8 + 1, mask=inside & (bit // 8 + 1 < nbytes), other=0).to(tl.int32)
    digit = ((first | (second << 8)) >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)
    if BITS == 1:
        return (digit * 2 - 1).to(tl.float32)
    return digit.to(tl.float32) + low


@triton.jit
def _product(
    x, packed, scale, out, n, d_out, d_in, nbytes, num_groups, group_size, low,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    outs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    total = tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32)
    for start in range(0, d_in, BLOCK_IN):
        ins = start + tl.arange(0, BLOCK_IN)
        here = (rows < n)[:, None] & (ins < d_in)[None, :]
        some = tl.load(x + rows[:, None].to(tl.int64) * d_in + ins[None, :], mask=here, other=0.0)
        inside = (ins < d_in)[:, None] & (outs < d_out)[None, :]
        index = outs[None, :].to(tl.int64) * d_in + ins[:, None]
        codes = _codes(packed, nbytes, index, inside, low, BITS)
        group = outs[None, :].to(tl.int64) * num_groups + ins[:, None] // group_size
        weight = codes * tl.load(scale + group, mask=inside, other=0.0).to(
            tl.float32
        )  # (BLOCK_IN, BLOCK_OUT)
        total += tl.dot(some.to(tl.float32), weight, input_precision="ieee")
    at = rows[:, None].to(tl.int64) * d_out + outs[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(rows < n)[:, None] & (outs < d_out)[None, :])


def packed_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, levels: tuple[int, ...], group_size: int | None
) -> Tensor:
    """As `quant.packed.packed_matmul`, the sums in float32."""
    x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
    (n, d_in), (d_out, num_groups) = x.shape, scale.shape
    out = torch.empty(n, d_out, dtype=x.dtype, device=x.device)
    bits = 0 if levels == (-1, 0, 1) else (len(levels) - 1).bit_length()
    grid = (triton.cdiv(n, _TILES["BLOCK_N"]), triton.cdiv(d_out, _TILES["BLOCK_OUT"]))
    _product[grid](
        x, packed, scale, out, n, d_out, d_in, packed.numel(), num_groups, group_size or d_in, float(levels[0]),
        BITS=bits, **_TILES,
    )  # fmt: skip
    return out
