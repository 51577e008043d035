"""What the kinds of references share: the shape of a task, of its data, and of a fitted witness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from peelcli.errors import ArtefactError
from peelcli.quant.fake_quantize import dequantize
from peelcli.records.quant_spec import QuantSpec


class Forward(Protocol):
    """A block as a function: O_l (n_seq, seq_len, d_model) from O_{l−1} of the same shape, `weights` put in place."""

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Run the block on the batch `ids` (n_seq, seq_len)."""
        ...


@dataclass(frozen=True)
class Batch:
    """Some sequences: ids (n, seq_len), inputs O_{l−1} and targets O_t, both (n, seq_len, d_model)."""

    ids: Tensor
    inputs: Tensor
    targets: Tensor


class Data(Protocol):
    """Sequences of one part of the split, read a few at a time."""

    def __len__(self) -> int:
        """How many sequences there are."""
        ...

    def batch(self, rows: Sequence[int]) -> Batch:
        """Those sequences, on the device and in the dtype that the block runs in."""
        ...


@dataclass(frozen=True)
class LinearMap:
    """A weight matrix that a reference replaces: its trained value, and whether it is stored (…, d_in, d_out)."""

    name: str
    weight: Tensor
    transposed: bool

    def oriented(self) -> Tensor:
        """The weight as (…, d_out, d_in), the orientation that schemes speak of."""
        return self.weight.transpose(-1, -2).contiguous() if self.transposed else self.weight


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight exactly in its scheme: int8 codes (…, d_out, d_in) and scales (…, d_out, n_groups) or (…, 1, 1).

    Zero points, where there are any, are whole codes of the shape of the scales.
    """

    codes: Tensor
    scale: Tensor
    spec: QuantSpec
    transposed: bool
    zero_point: Tensor | None = None

    def weight(self, like: Tensor) -> Tensor:
        """The weight as the block stores it, in `like`'s dtype and on its device."""
        value = dequantize(
            self.codes.to(like.device),
            self.scale.to(like.device),
            self.spec,
            like.dtype,
            None if self.zero_point is None else self.zero_point.to(like.device),
        )
        return value.transpose(-1, -2).contiguous() if self.transposed else value


@dataclass(frozen=True)
class Scaling:
    """A matrix of the checkpoint itself at another length: a factor for each of equal parts along `dim`, as stored."""

    factors: Tensor  # (count,)
    dim: int = 0

    def weight(self, trained: Tensor) -> Tensor:
        """The matrix, each part times its factor."""
        count = len(self.factors)
        shape = [1] * trained.ndim
        shape[self.dim] = -1 if count > 1 else 1
        each = self.factors.to(trained).repeat_interleave(
            trained.shape[self.dim] // count if count > 1 else 1
        )
        return trained * each.view(shape)


@dataclass(frozen=True)
class Replacement:
    """The weights of a fitted reference: anyone can put them into the checkpoint and measure again.

    `quantized` are in a scheme; `plain` (schemes `fp` and kind `challenge`) replace parameters as they are; `scaled`
    (kind `rescale`) are the checkpoint's own.
    """

    quantized: Mapping[str, QuantizedMatrix] = field(default_factory=dict)
    plain: Mapping[str, Tensor] = field(default_factory=dict)
    scaled: Mapping[str, Scaling] = field(default_factory=dict)

    def weights(self, like: Tensor, trained: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Parameter name → value, in `like`'s dtype and on its device.

        trained: the block's own parameters, by the same names. Raises ArtefactError where `scaled` does not fit them.
        """
        found = {name: value.to(like) for name, value in self.plain.items()}
        found |= {name: matrix.weight(like) for name, matrix in self.quantized.items()}
        for name, scaling in self.scaled.items():
            own = None if trained is None else trained.get(name)
            count = len(scaling.factors)
            if own is None or not 0 <= scaling.dim < own.ndim or not count or own.shape[scaling.dim] % count:
                raise ArtefactError(
                    f"the factors of {name!r} fit no matrix of this block: the fit belongs to another checkpoint, or "
                    "was changed; fit again"
                )
            found[name] = scaling.weight(own.detach()).to(like)
        return found


@dataclass(frozen=True)
class Budget:
    """How long and how hard a reference is fitted. `learning_rate` is per step, relative to each weight's RMS."""

    steps: int
    learning_rate: float
    batch_size: int  # sequences a step
    seed: int
    start: str  # "warm": from the trained weights; "fresh": from random ones of the same spread
    betas: tuple[float, float] = (0.9, 0.98)  # of Adam; the first is orthogonalised steps' momentum, too
    scale_rate: float = 1.0  # the step size of scales, relative to that of weights
    at_once: bool = False  # whether the forward may be called from several threads at once, and gains by it
    orthogonal: bool = False  # whether the weights' steps are orthogonalised; those of scales are Adam's
