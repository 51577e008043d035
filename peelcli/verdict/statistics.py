"""Paired intervals, one-sided tests and Holm's correction; numpy and the standard library only.

The unit is the sequence: `differences[i]` is sequence i's loss under one network less its loss under the
other, in nats per token. Sequences are taken as independent draws, tokens within one are not.

A few sequences bear most of some changes, so that the differences are skewed, and Student's t with them: with 32
sequences the 95% interval of such a mean holds it in 91% of draws, and misses it on one side three times as often as it
should. Hall's transformation takes the skewness out of t (P. Hall, "On the removal of skewness by transformation",
Journal of the Royal Statistical Society B 54, 1992):

    g(t) = t + a t²/3 + a² t³/27 + a/6,    a = skewness of the differences / √n

which is monotone. g(t) is then compared with Student's quantiles. Of few sequences the skewness is hardly known: what
is seen counts n/(n + 6) of itself, for its sampling variance is 6/n, and the skewnesses measured differ by about 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

K = TypeVar("K")

_FRACTION_TERMS = 10_000  # far beyond what converges: about sqrt(max(a, b)) terms are needed
_TINY = 1e-300
_NO_SKEW = 1e-6  # below, the inverse would lose its digits, and g(t) is t


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval, in the unit of the differences."""

    mean: float
    low: float
    high: float
    standard_error: float
    n: int


def paired_interval(differences: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of `differences` (n,), one a sequence, and the interval that holds the true mean.

    `confidence` is how often such intervals hold it. The mean lies within, and not in the middle where the differences
    are skewed. Differences that are all equal give an interval of width 0. Raises ValueError for fewer than two
    differences, for one not finite, and for a confidence outside (0, 1).
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence}: expected a number between 0 and 1, both excluded")
    mean, standard_error, n, a = _summary(differences)
    if standard_error == 0.0:
        return Interval(mean, mean, mean, 0.0, n)
    t = student_t_quantile(0.5 + confidence / 2, n - 1)
    low, high = (mean - standard_error * _skewed(sign * t, a) for sign in (1, -1))
    return Interval(mean, min(low, mean), max(high, mean), standard_error, n)


def p_greater(differences: Sequence[float], threshold: float = 0.0) -> float:
    """One-sided p-value of H0 "the true mean is at most `threshold`", from `differences` (n,).

    Differences that are all equal give 0 where they lie above the threshold, else 1. Raises ValueError as
    `paired_interval` does.
    """
    mean, standard_error, n, a = _summary(differences)
    if not math.isfinite(threshold):
        raise ValueError(f"threshold {threshold}: expected a finite number")
    if standard_error == 0.0:
        return 0.0 if mean > threshold else 1.0
    return student_t_cdf(-_unskewed((mean - threshold) / standard_error, a), n - 1)


def p_less(differences: Sequence[float], threshold: float = 0.0) -> float:
    """One-sided p-value of H0 "the true mean is at least `threshold`"; the mirror image of `p_greater`."""
    return p_greater([-value for value in differences], -threshold)


def holm_adjusted(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjusted p-values, in the order given: reject where one is at most alpha.

    Keeps the chance of any false rejection among all hypotheses at most alpha, however they depend on each
    other (S. Holm, "A simple sequentially rejective multiple test procedure", 1979). Raises ValueError for a
    value outside [0, 1].
    """
    for position, value in enumerate(p_values):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"p_values[{position}] is {value}: expected a probability from 0 to 1")
    adjusted = [0.0] * len(p_values)
    running = 0.0
    order = sorted(range(len(p_values)), key=lambda position: p_values[position])
    for rank, position in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = running
    return tuple(adjusted)


def holm(p_values: Sequence[float], alpha: float) -> tuple[bool, ...]:
    """Which hypotheses Holm's procedure rejects at family-wise level `alpha`, in the order given."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha {alpha}: expected a number between 0 and 1, both excluded")
    return tuple(adjusted <= alpha for adjusted in holm_adjusted(p_values))


def holm_of(p_values: Mapping[K, float], alpha: float) -> dict[K, bool]:
    """The same of hypotheses that have names."""
    return dict(zip(p_values, holm(list(p_values.values()), alpha), strict=True))


def student_t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for Student's t with `degrees` >= 1 degrees of freedom."""
    if degrees < 1:
        raise ValueError(f"degrees of freedom {degrees}: expected at least 1")
    square = t * t
    if math.isinf(square):
        tail = 0.0
    else:
        # Both arguments are formed directly: 1 - x would lose every digit for small t.
        total = degrees + square
        tail = 0.5 * _incomplete_beta(degrees / 2, 0.5, degrees / total, square / total)
    return tail if t < 0 else 1.0 - tail


@lru_cache(maxsize=256)
def student_t_quantile(p: float, degrees: int) -> float:
    """The t with P(T <= t) = `p`, for 0 < p < 1, by bisection to the last bit."""
    if not 0.0 < p < 1.0:
        raise ValueError(f"probability {p}: expected a number between 0 and 1, both excluded")
    if p == 0.5:
        return 0.0
    if p > 0.5:  # in the lower tail the cdf keeps its relative precision
        return -student_t_quantile(1.0 - p, degrees)
    low = -1.0
    while student_t_cdf(low, degrees) > p:
        low *= 2.0
    high = 0.0 if low == -1.0 else low / 2.0
    while low < (middle := (low + high) / 2.0) < high:
        if student_t_cdf(middle, degrees) > p:
            high = middle
        else:
            low = middle
    return high


def _unskewed(t: float, a: float) -> float:
    """g(t), with the skewness of t's distribution taken out; a: of the differences, over the root of n."""
    return t + a * t * t / 3.0 + a * a * t**3 / 27.0 + a / 6.0


def _skewed(g: float, a: float) -> float:
    """The t of that g(t)."""
    if abs(a) < _NO_SKEW:
        return g
    cube = 1.0 + a * (g - a / 6.0)
    return 3.0 / a * (math.copysign(abs(cube) ** (1.0 / 3.0), cube) - 1.0)


def _summary(differences: Sequence[float]) -> tuple[float, float, int, float]:
    """Mean, standard error, n, and the skewness to be taken out, over the root of n, of `differences` (n,).

    The error is exactly 0 where all are equal.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"differences {values.shape}: expected n >= 2 sequences, found n = {values.size}")
    for position in np.flatnonzero(~np.isfinite(values)):
        raise ValueError(
            f"differences[{position}] of n = {values.size} is {values[position]}: expected a finite number"
        )
    if values.min() == values.max():  # the rounding of the mean would otherwise pass for a variance
        return float(values[0]), 0.0, values.size, 0.0
    root, spread = math.sqrt(values.size), float(values.std())
    skewness = float((((values - values.mean()) / spread) ** 3).mean()) if spread > 0.0 else 0.0
    shrunk = skewness * values.size / (values.size + 6)
    return float(values.mean()), float(values.std(ddof=1) / root), values.size, shrunk / root


def _incomplete_beta(a: float, b: float, x: float, complement: float) -> float:
    """The regularised incomplete beta function I_x(a, b), with `complement` = 1 - x given exactly."""
    if x <= 0.0:
        return 0.0
    if complement <= 0.0:
        return 1.0
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log(complement) - log_beta)
    if x < (a + 1.0) / (a + b + 2.0):  # on this side of the mean the fraction converges quickly
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, complement) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of I_x(a, b) (Abramowitz & Stegun 26.5.8), evaluated by Lentz's method."""
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > _TINY else _TINY)
    value = d
    for m in range(1, _FRACTION_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > _TINY else _TINY)
            c = 1.0 + term / c
            c = c if abs(c) > _TINY else _TINY
            step = c * d
            value *= step
        if abs(step - 1.0) < 1e-15:
            return value
    raise ArithmeticError(f"incomplete beta at a={a}, b={b}, x={x}: not converged in {_FRACTION_TERMS} terms")


def running_minimum(bounds: Iterable[float]) -> tuple[float, ...]:
    """The least bound up to each checkpoint of a run, a stair-step that stays achievable.

    A checkpoint without a bound (nan) adds nothing: the step stays where it was, at infinity while there is none.
    """
    steps = [math.inf]
    for bound in bounds:
        steps.append(min(steps[-1], math.inf if math.isnan(bound) else bound))
    return tuple(steps[1:])
