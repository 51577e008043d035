"""One audit of a run, as its history keeps it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HistoryLayer:
    """What a history keeps of one layer; `reference_key` names the reference that decided."""

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
    """What a history keeps of the network as a whole."""

    ce: float | None = None
    perplexity: float | None = None
    zone: str | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class HistoryEntry:
    """One audit as a line of a history: the summary of a run in the JSON report, under the same names."""

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
