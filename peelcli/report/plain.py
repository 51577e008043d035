"""Figures and untrusted names as short, safe plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import PurePath

from peelcli.records.printable import printable as printable  # the formats take both from here

LOPSIDED = 1.5  # the sides of an interval that are shown as one differ by this factor at most


def base_name(checkpoint: str) -> str:
    """The last part of a checkpoint's path or name; the whole of it where there is none."""
    return PurePath(checkpoint).name or checkpoint


def fixed(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` decimals; `-` where there is none, and a word where it is not finite."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if abs(value) >= 1000:
        return f"{value:.4g}"
    return f"{round(value, digits) + 0.0:.{digits}f}"  # adding 0.0 turns -0.0 into 0.0


def signed(value: float | None, digits: int = 4) -> str:
    """Like `fixed`, with a plus sign on what is positive once rounded."""
    text = fixed(value, digits)
    return f"+{text}" if value is not None and value > 0 and round(value, digits) > 0 else text


def short(value: float | None) -> str:
    """A figure of three significant digits, such as bits per weight: 0, 1.58, 16."""
    return fixed(value) if value is None or not math.isfinite(value) else f"{value:.3g}"


def gap_with_interval(gap: float | None, interval: tuple[float, float] | None) -> str:
    """`+0.0100 ±0.0040`, the wider side, or `+0.0100 [-0.0060, +0.0140]` where the sides differ by more than half."""
    if gap is None or interval is None:
        return signed(gap)
    low, high = interval
    narrower, wider = sorted((gap - low, high - gap))
    if not math.isfinite(narrower + wider) or narrower < 0 or wider > LOPSIDED * narrower + 1e-4:
        return f"{signed(gap)} {bracketed(interval)}"
    return f"{signed(gap)} ±{fixed(wider, 4)}"


def bracketed(interval: tuple[float, float] | None) -> str:
    """`[+0.0060, +0.0140]`."""
    return "-" if interval is None else f"[{signed(interval[0])}, {signed(interval[1])}]"


def layer_list(layers: Iterable[int]) -> str:
    """Layers in order, runs of three or more drawn together: `1, 4-6`."""
    ordered = sorted(set(layers))
    spans: list[list[int]] = []
    for layer in ordered:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    parts = [f"{s[0]}-{s[-1]}" if len(s) > 2 else ", ".join(map(str, s)) for s in spans]
    return ", ".join(parts)


def layers_named(layers: Iterable[int]) -> str:
    """`layer 3` or `layers 1, 4-6`."""
    ordered = sorted(set(layers))
    return f"layer{'s' if len(ordered) != 1 else ''} {layer_list(ordered)}"
