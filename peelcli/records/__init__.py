"""Frozen results that cross rooms: plain numbers and strings, no tensors.

Layers count from 1. Losses are in nats per token. A tuple of floats named `nll_*` holds one mean per sequence,
because the sequence, not the token, is the unit of every statistic.
"""

from peelcli.records.few_bits import Quantized, QuantizedModule
from peelcli.records.history import HistoryEntry, HistoryLayer, HistoryNetwork
from peelcli.records.reference import (
    KINDS,
    SUBLAYERS,
    WITHOUT_WEIGHTS,
    Dropped,
    FitOutcome,
    LayerWeights,
    Other,
    Paths,
    PathScore,
    Reference,
    Score,
    Stored,
    Trained,
)
from peelcli.records.result import (
    CHANGES,
    VERDICTS,
    AuditResult,
    Bound,
    Bounds,
    Comparison,
    LayerChange,
    LayerVerdict,
    NetworkVerdict,
)
from peelcli.records.run import Finding, Run, run_from

__all__ = [
    "AuditResult",
    "Bound",
    "Bounds",
    "CHANGES",
    "Comparison",
    "Dropped",
    "Finding",
    "FitOutcome",
    "HistoryEntry",
    "HistoryLayer",
    "HistoryNetwork",
    "KINDS",
    "LayerChange",
    "LayerVerdict",
    "LayerWeights",
    "NetworkVerdict",
    "Other",
    "PathScore",
    "Paths",
    "Quantized",
    "QuantizedModule",
    "Reference",
    "Run",
    "SUBLAYERS",
    "Score",
    "Stored",
    "Trained",
    "VERDICTS",
    "WITHOUT_WEIGHTS",
    "run_from",
]
