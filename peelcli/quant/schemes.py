"""The schemes: which weights a reference may use.

A table of plain numbers, so that the CLI can list it without torch.

A scheme is the set Q of "Trust, but Verify: Peeling Low-Bit Transformer Networks for Training Monitoring"
(arXiv 2605.02853): every weight of a reference is one of `levels` times the scale of its channel or group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from peelcli.errors import UsageError


@dataclass(frozen=True)
class Scheme:
    """A set of weights: `code * scale`, with `code` one of `levels` and one `scale` per channel or group."""

    name: str
    """One string everywhere: registry key, CLI value, YAML value."""
    num_bits: float
    """Bits per weight, the scales not counted."""
    levels: tuple[int, ...] = ()
    """The codes, ascending, in units of the scale; empty where weights are free (`fp`)."""

    @property
    def is_free(self) -> bool:
        """True where the scheme leaves weights as they are."""
        return not self.levels

    @property
    def qmin(self) -> int:
        """The lowest code; UsageError for a free scheme, which has none."""
        return self._codes_of()[0]

    @property
    def qmax(self) -> int:
        """The highest code; UsageError for a free scheme, which has none."""
        return self._codes_of()[-1]

    def _codes_of(self) -> tuple[int, ...]:
        if self.is_free:
            raise UsageError(
                f"scheme {self.name}: expected one with codes, found free weights; use a low-bit one"
            )
        return self.levels


def _integers(num_bits: int) -> Scheme:
    half = 2 ** (num_bits - 1)
    return Scheme(f"int{num_bits}", float(num_bits), tuple(range(-half, half)))


# From the cheapest up: the ladder that `effective_bits` climbs.
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("binary", 1.0, (-1, 1)),
        Scheme("ternary", math.log2(3), (-1, 0, 1)),
        _integers(2),
        _integers(3),
        *(_integers(num_bits) for num_bits in range(4, 9)),
        Scheme("fp", 16.0),
    )
}


def scheme_named(name: str) -> Scheme:
    """The scheme of that name; UsageError with the choices where there is none."""
    if name not in SCHEMES:
        raise UsageError(f"scheme: expected one of {', '.join(SCHEMES)}, found {name!r}; choose one of these")
    return SCHEMES[name]
