"""The common form of all packed formats: integer codes, scales, zero points, and the weights that share a scale.

    weight[i, j] = (codes[i, j] − zero_point[b]) · scale[b]        b: the block of rows and columns that holds (i, j)

A format's own file only locates the codes. This file checks that codes and scales match, and dequantises them.
Everything is untrusted input: each declared shape is compared with the tensors that were read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peelcli.checkpoint.files import CheckpointFiles
from peelcli.errors import CheckpointError
from peelcli.records import QuantizedModule

Parts = Mapping[str, Tensor]  # role, such as "codes" or "scale" → the tensor as it is stored
OUTLIER = 4.0  # a scale is an outlier if it differs by more than this factor from its matrix's median scale


@dataclass(frozen=True)
class Codes:
    """One weight (d_out, d_in) as its file holds it."""

    codes: Tensor  # (d_out, d_in), whole numbers, or floating numbers of 8 bits
    scale: Tensor  # (ceil(d_out / block[0]), ceil(d_in / block[1]))
    block: tuple[int, int]  # rows and columns that share a scale
    zero_point: Tensor | None = None  # the code of weight 0, shaped as `scale`
    group_of: Tensor | None = (
        None  # (d_in,): the column of `scale` that each input uses; None if they are in order
    )


@dataclass(frozen=True)
class PackedWeight:
    """The stored tensors of one packed weight and the function that decodes them. parts: role → tensor name."""

    name: str  # of the plain weight, such as model.layers.0.mlp.up_proj.weight
    scheme: str
    num_bits: float
    parts: Mapping[str, str]
    decode: Callable[[Parts], Codes]


@dataclass(frozen=True)
class Activations:
    """How the inputs x of quantised linear maps are rounded: to num_bits, with scale max|x| / peak for each token."""

    num_bits: int
    peak: float
    by_inverse: bool = (
        False  # x is multiplied by the inverse of the scale, not divided by it, which rounds ties differently
    )


@dataclass(frozen=True)
class Packing:
    """The packed weights of a checkpoint. Tensors that it does not name are plain."""

    method: str  # as quantization_config calls it
    weights: tuple[PackedWeight, ...]
    dropped: frozenset[str] = frozenset()  # tensors that only the quantised kernels use
    activations: Activations | None = None
    notes: tuple[
        str, ...
    ] = ()  # sentences that say where peel runs the weights differently from what the file says
    scaled: Mapping[str, str] = field(default_factory=dict)  # plain tensor → tensor that it is multiplied by

    @property
    def consumed(self) -> frozenset[str]:
        """Names of the stored tensors that the plain checkpoint does not contain."""
        return self.dropped | {name for weight in self.weights for name in weight.parts.values()}


def dequantize(name: str, found: Codes) -> Tensor:
    """The weight (d_out, d_in), float32. Raises CheckpointError if the shapes of codes, scales and blocks disagree."""
    codes = found.codes
    if codes.ndim != 2 or codes.numel() == 0:
        raise damaged(name, f"has codes of shape {list(codes.shape)}, expected (d_out, d_in)")
    expected = tuple(-(-size // step) for size, step in zip(codes.shape, found.block, strict=True))
    for what, value in (("steps", found.scale), ("zero points", found.zero_point)):
        if value is not None and tuple(value.shape) != expected:
            raise damaged(
                name,
                f"of shape {list(codes.shape)} has {what} of shape {list(value.shape)}, expected {list(expected)}",
            )
    value = codes.float()
    if found.zero_point is not None:
        value = value - _spread(name, found.zero_point.float(), found)
    return value * _spread(name, found.scale.float(), found)


def _spread(name: str, value: Tensor, found: Codes) -> Tensor:
    """Expand values per block to values per weight, or to a shape that broadcasts to (d_out, d_in)."""
    d_out, d_in = found.codes.shape
    if value.shape[0] not in (1, d_out):
        value = value.repeat_interleave(found.block[0], dim=0)[:d_out]
    if found.group_of is not None:
        groups = found.group_of.long()
        if tuple(groups.shape) != (d_in,) or int(groups.min()) < 0 or int(groups.max()) >= value.shape[1]:
            raise damaged(
                name,
                f"says of its {d_in} inputs that they lie in groups other than 0 to {value.shape[1] - 1}",
            )
        return value[:, groups]
    return value if value.shape[1] in (1, d_in) else value.repeat_interleave(found.block[1], dim=1)[:, :d_in]


def describe(weight: PackedWeight, found: Codes, value: Tensor, layer: int | None) -> QuantizedModule:
    """The record of how one weight is quantised. value: the dequantised `found`, (d_out, d_in)."""
    d_out, d_in = value.shape
    rows, columns = found.block
    granularity = "group" if columns < d_in else "channel" if rows < d_out else "tensor"
    median, outliers = step_figures(found.scale)
    return QuantizedModule(
        name=weight.name.removesuffix(".weight"),
        layer=layer,
        scheme=weight.scheme,
        num_bits=weight.num_bits,
        granularity=granularity,
        group_size=columns if columns < d_in else None,
        zeros=float((value == 0).float().mean()),
        scale=median,
        scale_outliers=outliers,
    )


def step_figures(scale: Tensor) -> tuple[float, float]:
    """The median scale, and the share of scales that differ from it by more than the factor `OUTLIER`, or are zero."""
    steps = scale.detach().float().abs().flatten()
    median = float(steps.median())
    ratio = steps / max(median, 1e-30)
    return median, float(((ratio > OUTLIER) | (ratio < 1 / OUTLIER)).float().mean())


def qweights(files: CheckpointFiles) -> Iterator[tuple[str, dict[str, str]]]:
    """Every module with a `qweight` (GPTQ and AWQ), and the names of its codes, zero points and scales."""
    for qweight in sorted(name for name in files.tensors if name.endswith(".qweight")):
        module = qweight.removesuffix(".qweight")
        parts = {"codes": qweight, "zeros": f"{module}.qzeros", "scale": f"{module}.scales"}
        absent = [part for part in parts.values() if part not in files.tensors]
        if absent:
            raise damaged(f"{module}.weight", f"lacks {absent[0]!r}")
        yield module, parts


def share(name: str, size: int, num_steps: int, declared: object) -> int:
    """The number of neighbouring rows or columns, of `size`, that share one of `num_steps` scales.

    declared: the number in the config, if any. Raises CheckpointError if it contradicts `num_steps`, or if nothing is
    declared and `size` is not a multiple of `num_steps`.
    """
    if not 1 <= num_steps <= size:
        raise damaged(name, f"has {num_steps} steps for {size} rows or columns")
    if num_steps == 1:
        return size
    if isinstance(declared, int) and not isinstance(declared, bool) and declared > 0:
        if -(-size // declared) != num_steps:
            raise damaged(
                name, f"has {num_steps} steps for {size} rows or columns, and {declared} are to share one"
            )
        return declared
    if size % num_steps:
        raise damaged(name, f"has {num_steps} steps, which {size} rows or columns are not a multiple of")
    return size // num_steps


def damaged(name: str, what: str) -> CheckpointError:
    """The error for a packed weight that contradicts itself."""
    return CheckpointError(
        f"the packed weight {name!r} {what}: it cannot be unpacked. Check that config.json and the weights come from "
        "the same run, or copy the checkpoint again."
    )
