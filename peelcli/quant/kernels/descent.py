"""Walks over the columns of a low-bit weight, descent and rounding with feedback, in the version that serves a call."""

from __future__ import annotations

from torch import Tensor

from peelcli.quant.kernels import eager
from peelcli.quant.kernels.choice import triton_serves


def coordinate_descent_(
    codes: Tensor,
    scale: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    levels: Tensor,
    group_of: Tensor,
) -> Tensor:
    """As `eager.coordinate_descent_`, on a GPU by a kernel where all is float32."""
    if triton_serves(codes, scale, gradient, hessian, levels, dtypes=("float32",)):
        from peelcli.quant.kernels import triton_descent

        return triton_descent.coordinate_descent_(codes, scale, gradient, hessian, levels, group_of)
    return eager.coordinate_descent_(codes, scale, gradient, hessian, levels, group_of)


def round_with_feedback(
    scale: Tensor,
    zero_point: Tensor | None,
    target: Tensor,
    factor: Tensor,
    levels: Tensor,
    group_of: Tensor,
) -> Tensor:
    """As `eager.round_with_feedback`, on a GPU by a kernel where all is float32."""
    if triton_serves(scale, zero_point, target, factor, levels, dtypes=("float32",)):
        from peelcli.quant.kernels import triton_descent

        return triton_descent.round_with_feedback(scale, zero_point, target, factor, levels, group_of)
    return eager.round_with_feedback(scale, zero_point, target, factor, levels, group_of)
