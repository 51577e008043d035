"""What a checkpoint runs in few bits."""

from __future__ import annotations

from dataclasses import dataclass

from peelcli.records.quant_spec import QuantSpec


@dataclass(frozen=True)
class QuantizedModule:
    """One weight matrix that the checkpoint runs in few bits. Shares are of its weights or of its steps."""

    name: str  # of the module, such as model.layers.0.mlp.up_proj
    layer: int | None
    scheme: str
    num_bits: float
    granularity: str  # what shares a step: "tensor", "channel" or "group"
    group_size: int | None
    zeros: float  # share of weights that are 0
    scale: float  # the median step
    scale_outliers: float  # share of steps four times larger or smaller than that
    clipped: float | None = (
        None  # share of latent weights outside the clip range; None where no latents are kept
    )

    @property
    def spec(self) -> QuantSpec:
        """Its scheme, whether we have one of that name or not, and what shares a step."""
        return QuantSpec(self.scheme, self.group_size, self.granularity)


@dataclass(frozen=True)
class Quantized:
    """What a checkpoint runs in few bits, and how that is known."""

    method: str  # of quantization_config, or "trained_scheme" where the user says so
    modules: tuple[QuantizedModule, ...]
    activation_bits: int | None = None  # to which the inputs of those matrices are rounded, per token
    notes: tuple[str, ...] = ()  # what is run otherwise than the checkpoint asks, in words
