"""The measurements of one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peelcli.records.few_bits import Quantized, QuantizedModule
from peelcli.records.reference import Paths, Score


@dataclass(frozen=True)
class Finding:
    """Something found in the files of the checkpoint or of the calibration text."""

    # "non-finite" and "duplicate-layer" make a layer broken. All others are notes: "constant", "surplus-layers",
    # "layers-unknown", "identical-checkpoint", "identical-layer"; of files that were not audited or not run
    # "other-weights", "stale-shards", "adapter", "own-code", "unused-tensors"; of the text "padding",
    # "unknown-tokens" and "tokenizer"
    kind: str
    message: str
    layer: int | None = None
    tensor: str | None = None

    @property
    def is_non_finite(self) -> bool:
        """Whether values are NaN or infinite, so that nothing can be measured."""
        return self.kind == "non-finite"


@dataclass(frozen=True)
class Run:
    """All measurements of one checkpoint; `verdict.judge` turns them into an AuditResult."""

    checkpoint: str
    checkpoint_id: str
    num_layers: int
    layers: tuple[int, ...]  # the layers that were audited
    seed: int
    tokens: dict[str, int]  # {"fit": …, "select": …, "eval": …}
    seq_len: int
    data: str  # which text, in words
    vocab_size: int
    data_hash: str = ""  # SHA-256 of the calibration tokens and their division; "" where nothing was measured
    scheme: str = ""
    nll_select: tuple[float, ...] = ()
    nll_eval: tuple[float, ...] = ()
    entropy_eval: tuple[float, ...] = ()  # mean entropy of the model's own predictions on the same positions
    unigram_ce: float = 0.0  # CE on `eval` of the token frequencies of `fit`: what no context at all achieves
    layer_bits: tuple[float, ...] = ()  # bits per weight each layer itself has, layer 1 first
    weight_rms: tuple[
        dict[str, dict[str, float]], ...
    ] = ()  # layer 1 first: sublayer or "block" → matrix → RMS
    vector_travel: tuple[
        dict[str, dict[str, float]], ...
    ] = ()  # the same of biases and norms: how far they lie from where training starts
    step: int | None = None
    group_size: int | None = None
    granularity: str = ""  # what shares a scale: "tensor", "channel" or "group"
    symmetric: bool = True  # False: each scale of a reference has a zero point
    family: str = ""
    dtype: str = ""
    device: str = ""
    config: dict[str, object] = field(default_factory=dict)
    scores: tuple[Score, ...] = ()
    paths: Paths | None = None
    layer_hashes: dict[str, str] = field(default_factory=dict)  # layer number → SHA-256 of its weights
    findings: tuple[Finding, ...] = ()
    skipped: tuple[str, ...] = ()  # what was not audited, and why, in words
    quantized: Quantized | None = (
        None  # what runs in few bits; None where the checkpoint says of nothing that it does
    )
    seconds: float = 0.0

    def scores_of(self, kind: str) -> list[Score]:
        """What was measured of the references of one kind."""
        return [s for s in self.scores if s.reference.kind == kind]

    def tried_on(self, layer: int) -> list[Score]:
        """Every measured reference."""
        return [s for s in self.scores if s.reference.layer <= layer <= s.reference.target]


def run_from(about: Mapping[str, Any], **measured: Any) -> Run:
    """A Run from its description as JSON values (with lists in place of tuples) and its measurements."""
    known = {f.name for f in fields(Run)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in about.items() if k in known}
    values["findings"] = tuple(Finding(**f) for f in about["findings"])
    values["quantized"] = _quantized(about.get("quantized"))
    return Run(**{**values, **measured})


def _quantized(about: Mapping[str, Any] | None) -> Quantized | None:
    if about is None:
        return None
    modules = tuple(QuantizedModule(**module) for module in about["modules"])
    return Quantized(about["method"], modules, about["activation_bits"], tuple(about["notes"]))
