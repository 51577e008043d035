"""What a run is to fit: plain facts about the network and the request. No tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peelcli.quant.schemes import SCHEMES
from peelcli.records.quant_spec import QuantSpec

BIT_WIDTH_SWEEP = ("binary", "ternary", "int2", "int3", "int4", "int8")
ALL_PAIRS = 8  # layers up to which any two are exchanged: in deeper networks neighbours alone


@dataclass(frozen=True)
class Origin:
    """An earlier checkpoint of the run. Layers count from 1."""

    id: str  # the first 12 hexadecimal digits of the checkpoint's
    step: int | None = None
    layer_hashes: Mapping[int, str] = field(default_factory=dict)  # where they could be told apart
    non_finite: frozenset[int] = frozenset()  # layers that hold NaN or infinities


@dataclass(frozen=True)
class Plan:
    """The request, and what the kinds need to know of the network to say which references it calls for."""

    num_layers: int
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    spec: QuantSpec  # of all references that have weights of their own
    sublayers: frozenset[int]  # the layers whose attention and MLP can be told apart
    layer_bits: Mapping[int, float]  # bits per weight that each layer itself has
    exchangeable: frozenset[tuple[int, int]] = frozenset()  # pairs of layers to exchange, the first one first
    is_damaged: bool = False  # its blocks together do harm: the text is read better without them
    ladder: tuple[str, ...] = ()  # further schemes for effective_bits
    origins: tuple[Origin, ...] = ()  # oldest first
    layer_hashes: Mapping[int, str] = field(
        default_factory=dict
    )  # the network's own, comparable to those of origins

    @property
    def scheme(self) -> str:
        """The scheme of the run's references, by name."""
        return self.spec.scheme

    def has_sublayers(self, layer: int) -> bool:
        """Whether attention and MLP of `layer` can be told apart."""
        return layer in self.sublayers

    def start(self, layer: int, scheme: str, asked: str, bits: float) -> str:
        """`warm` or `fresh`: a layer on a grid of no more bits than the scheme's would be fitted to itself."""
        if asked != "auto" or scheme == "fp":
            return "warm" if asked == "auto" else asked
        return "fresh" if self.layer_bits[layer] <= bits else "warm"


def default_scheme(layer_bits: Sequence[float]) -> str:
    """`ternary`, or `binary` where a layer has no more bits itself: references of more could not flag it.

    layer_bits: those of the audited layers; none where nothing could be measured.
    """
    return "binary" if any(bits < SCHEMES["ternary"].num_bits for bits in layer_bits) else "ternary"
