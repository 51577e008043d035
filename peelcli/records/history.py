"""The records of one line of a history: one audit of a training run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HistoryLayer:
    """One layer's figures in a history. reference_key: the reference that decided the verdict."""

    layer: int
    verdict: str
    flagged: bool = False
    sublayer: str | None = None
    score: float | None = None
    gap: float | None = None
    gap_interval: tuple[float, float] | None = None
    reference_key: str | None = None
    effective_bits: float | None = None
    fvu: float | None = None
    drop_cost: float | None = None


@dataclass(frozen=True)
class HistoryNetwork:
    """The whole network's figures in a history."""

    ce: float | None = None
    perplexity: float | None = None
    zone: str | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class HistoryEntry:
    """One audit as a line of a history. Its fields have the same names as the summary in the JSON report."""

    time: str  # when it was added, in UTC, as ISO 8601 has it
    checkpoint: str
    checkpoint_id: str
    num_layers: int
    flagged: bool
    network: HistoryNetwork
    layers: tuple[HistoryLayer, ...]
    step: int | None = None
    scheme: str = ""
    data_hash: str = ""
    flagged_layers: tuple[int, ...] = ()
    peel_version: str = ""
