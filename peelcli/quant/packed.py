"""Products with a packed weight, and the versions of hot functions that a call takes: kernels where they serve.

What is chosen depends on the tensors of the call (`kernels.choice`); the eager functions are the specification.
"""

from __future__ import annotations

from torch import Tensor

from peelcli.kernels.choice import triton_serves
from peelcli.quant.fake_quantize import dequantize
from peelcli.quant.packing import unpack
from peelcli.quant.schemes import Scheme

FEW = 64  # inputs up to which reading the weight outweighs the product; with more, cuBLAS on the unpacked weight serves


def packed_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, scheme: Scheme, group_size: int | None = None
) -> Tensor:
    """x (n, d_in) times the transpose of a weight (d_out, d_in) in `scheme`, in the dtype of x: (n, d_out).

    packed: its codes, of `packing.pack`. scale: (d_out, n_groups). ArtefactError where they are not of such a weight.
    """
    if len(x) <= FEW and triton_serves(x, scale):
        from peelcli.kernels import triton_packed

        return triton_packed.packed_matmul(x, packed, scale, scheme.levels, group_size)
    return eager_packed_matmul(x, packed, scale, scheme, group_size)


def eager_packed_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, scheme: Scheme, group_size: int | None = None
) -> Tensor:
    """As `packed_matmul`: unpacked, then multiplied."""
    codes = unpack(packed, scheme, (scale.shape[0], x.shape[1]))
    weight = dequantize(codes, scale, scheme, group_size)
    return (x.float() @ weight.T).to(x.dtype)
