"""What a checkpoint runs in few bits: a sentence for people, every module for scripts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from peelcli.records import AuditResult, Quantized, QuantizedModule

_STEPS = {"tensor": "one step a tensor", "channel": "one step a channel"}
_MANY_OUTLIERS = 0.01  # share of steps out of line that is worth a word


def few_bits_sentence(result: AuditResult) -> str | None:
    """How the network runs, in words; None where its weights are plain."""
    quantized = result.run.quantized
    if quantized is None or not quantized.modules:
        return None
    modules = quantized.modules
    kinds = Counter(_kind(module) for module in modules)
    what = "; ".join(f"{count} matrices in {kind}" for kind, count in kinds.most_common())
    parts = [f"{quantized.method.replace('_', ' ')}: {what}", _range("zeros", [m.zeros for m in modules])]
    if quantized.activation_bits:
        parts[0] += f"; inputs rounded to {quantized.activation_bits} bits a token"
    clipped = [m for m in modules if m.clipped is not None]
    if clipped:
        worst = max(clipped, key=lambda m: m.clipped or 0.0)
        parts.append(f"latent weights beyond the clip range up to {worst.clipped or 0.0:.1%} ({worst.name})")
    outliers = max(modules, key=lambda m: m.scale_outliers)
    if outliers.scale_outliers > _MANY_OUTLIERS:
        parts.append(f"steps out of line up to {outliers.scale_outliers:.1%} ({outliers.name})")
    return "; ".join([*parts, *quantized.notes])


def few_bits_json(quantized: Quantized | None) -> dict[str, Any] | None:
    """The record as JSON values, every module of it."""
    return None if quantized is None else asdict(quantized)


def _kind(module: QuantizedModule) -> str:
    steps = _STEPS.get(module.granularity) or f"one step for {module.group_size} weights"
    return f"{module.scheme}, {steps}"


def _range(what: str, shares: list[float]) -> str:
    low, high = min(shares), max(shares)
    return f"{what} {low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{what} {low:.0%} to {high:.0%}"
