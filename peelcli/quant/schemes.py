"""The schemes: which weights a reference may use.

A table of plain numbers, so that the CLI can list it without torch.

A scheme is the set Q of "Trust, but Verify: Peeling Low-Bit Transformer Networks for Training Monitoring"
(arXiv 2605.02853): every weight of a reference is one of `levels` times the scale of its channel or group.
`nf4`: Dettmers et al., QLoRA (arXiv 2305.14314), appendix E. `fp8_e4m3`: Micikevicius et al., FP8 Formats for Deep
Learning (arXiv 2209.05433), table 1, without its NaN, and with one zero for its two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from peelcli.errors import UsageError


@dataclass(frozen=True)
class Scheme:
    """A set of weights: a level times a scale, with one `scale` per channel or group.

    Codes are whole numbers, consecutive but for `binary`, and 0 stands for weight 0. Where levels are evenly spaced
    each is its own code; in a codebook (`nf4`, `fp8_e4m3`) a code counts the levels from 0.
    """

    name: str
    """One string everywhere: registry key, CLI value, YAML value."""
    num_bits: float
    """Bits per weight, the scales not counted."""
    levels: tuple[float, ...] = ()
    """Ascending, in units of the scale; empty where weights are free (`fp`)."""

    @property
    def is_free(self) -> bool:
        """True where the scheme leaves weights as they are."""
        return not self.levels

    @cached_property
    def is_codebook(self) -> bool:
        """True where a level is not its own code."""
        return any(level != int(level) for level in self.levels)

    @cached_property
    def codes(self) -> tuple[int, ...]:
        """The code of each level; UsageError for a free scheme, which has none."""
        if self.is_free:
            raise UsageError(
                f"scheme {self.name}: expected one with codes, found free weights; use a low-bit one"
            )
        if self.is_codebook:
            zero = self.levels.index(0.0)
            return tuple(range(-zero, len(self.levels) - zero))
        return tuple(int(level) for level in self.levels)

    @property
    def qmin(self) -> int:
        """The lowest code; UsageError for a free scheme."""
        return self.codes[0]

    @property
    def qmax(self) -> int:
        """The highest code; UsageError for a free scheme."""
        return self.codes[-1]

    @property
    def reach(self) -> tuple[float, float]:
        """The range of weights, in units of the scale, that the outermost levels serve: half a gap beyond them."""
        low, high = self.levels[:2], self.levels[-2:]
        return low[0] - (low[1] - low[0]) / 2, high[1] + (high[1] - high[0]) / 2


def _integers(num_bits: int) -> Scheme:
    half = 2 ** (num_bits - 1)
    return Scheme(f"int{num_bits}", float(num_bits), tuple(range(-half, half)))


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _e4m3(byte: int) -> float:
    """The number of a byte without its sign: 4 bits of exponent with bias 7, 3 of mantissa; 0x7F is NaN."""
    exponent, mantissa = byte >> 3, byte & 7
    return math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)


_E4M3 = tuple(math.copysign(_e4m3(abs(code)), code) for code in range(-0x7E, 0x7F))

# From the cheapest up.
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("binary", 1.0, (-1, 1)),
        Scheme("ternary", math.log2(3), (-1, 0, 1)),
        _integers(2),
        _integers(3),
        _integers(4),
        Scheme("nf4", 4.0, _NF4),
        *(_integers(num_bits) for num_bits in range(5, 9)),
        Scheme("fp8_e4m3", 8.0, _E4M3),
        Scheme("fp", 16.0),
    )
}


def scheme_named(name: str) -> Scheme:
    """The scheme of that name; UsageError with the choices where there is none."""
    if name not in SCHEMES:
        raise UsageError(f"scheme: expected one of {', '.join(SCHEMES)}, found {name!r}; choose one of these")
    return SCHEMES[name]
