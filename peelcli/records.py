"""Frozen results that cross rooms: plain numbers and strings, no tensors.

Layers count from 1. Losses are in nats per token. A tuple of floats named `nll_*` holds one mean per sequence,
because the sequence, not the token, is the unit of every statistic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

SUBLAYERS = ("attention", "mlp")
KINDS = ("identity", "direct", "span", "challenge", "rollback")
VERDICTS = ("broken", "surpassed", "matched", "undecided", "effective")
CHANGES = ("regressed", "missing", "better", "new", "same")


@dataclass(frozen=True)
class Reference:
    """What stands in for a part of the checkpoint: layers `layer`…`target`, or one sublayer of `layer`.

    `sublayer` is None for whole blocks; `scheme` is None where the reference has no weights of its own
    (`identity`) or keeps the checkpoint's precision (`challenge`, `rollback`). `bits` is per weight of the part
    replaced (0 for `identity`, the scheme's bits divided by the number of layers for `span`). `origin_*` say which
    earlier checkpoint of the run a `rollback` comes from: the first 12 hexadecimal digits of its id, and its step.
    """

    kind: str
    layer: int
    target: int
    sublayer: str | None = None
    scheme: str | None = None
    group_size: int | None = None
    bits: float = 0.0
    origin_id: str | None = None
    origin_step: int | None = None

    @property
    def dropped(self) -> tuple[str, ...]:
        """The sublayers that contribute nothing with it in place: of `identity` alone."""
        if self.kind != "identity":
            return ()
        return (self.sublayer,) if self.sublayer else SUBLAYERS

    @property
    def key(self) -> str:
        """A name that is unique within a run and safe as an HDF5 group name, such as `direct-003-attention-ternary`."""
        part = self.sublayer or "block"
        layers = f"{self.layer:03d}" if self.target == self.layer else f"{self.layer:03d}to{self.target:03d}"
        return "-".join(filter(None, (self.kind, layers, part, self.scheme, self.origin_id)))


@dataclass(frozen=True)
class FitOutcome:
    """How the fit of one reference went. `fvu_*` is the share of the layers' update left unexplained."""

    start: str  # "warm", "fresh", "trained" (challenge), "earlier" (rollback) or "none" (identity: nothing is fitted)
    steps: int
    converged: bool
    reason: str  # why it stopped, in words
    fvu_fit: float | None = None
    fvu_eval: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Score:
    """One reference, measured in place: per-sequence losses, paired with the run's own.

    `kl_eval` is KL(trained ‖ with the reference), the mean over each sequence's positions, in nats per token.
    """

    reference: Reference
    fit: FitOutcome
    nll_select: tuple[float, ...]
    nll_eval: tuple[float, ...]
    kl_eval: tuple[float, ...]


@dataclass(frozen=True)
class PathScore:
    """A network of peeled blocks and a light head, measured; losses per sequence, paired with the run's own.

    `target_map` is empty for the head control: the trained blocks with a refitted head.
    """

    target_map: tuple[int, ...]
    fits: tuple[FitOutcome, ...]  # of layers 1…K (none for the control), then of the head
    unexplained: tuple[float, ...]  # per layer, the share of its target's variance left over on `eval`
    nll_select: tuple[float, ...]
    nll_eval: tuple[float, ...]


@dataclass(frozen=True)
class Paths:
    """What was peeled on one checkpoint: its head control, and every map that was fitted."""

    control: PathScore
    scores: tuple[PathScore, ...]
    schemes: tuple[str, ...]  # that the block of each layer lies in: the layer's own
    left_out: tuple[str, ...] = ()  # maps that were asked for and not peeled, and why, in words
    num_fits: int = 0  # of blocks, those of the search's segments included
    seconds: float = 0.0


@dataclass(frozen=True)
class QuantizedModule:
    """One weight matrix that the checkpoint runs in few bits. Shares are of its weights or of its steps."""

    name: str  # of the module, such as model.layers.0.mlp.up_proj
    layer: int | None
    scheme: str
    num_bits: float
    granularity: str  # what shares a step: "tensor", "channel" or "group"
    group_size: int | None
    zeros: float  # share of weights that are 0
    scale: float  # the median step
    scale_outliers: float  # share of steps four times larger or smaller than that
    clipped: float | None = (
        None  # share of latent weights outside the clip range; None where no latents are kept
    )


@dataclass(frozen=True)
class Quantized:
    """What a checkpoint runs in few bits, and how that is known."""

    method: str  # of quantization_config, or "trained_scheme" where the user says so
    modules: tuple[QuantizedModule, ...]
    activation_bits: int | None = None  # to which the inputs of those matrices are rounded, per token
    notes: tuple[str, ...] = ()  # what is run otherwise than the checkpoint asks, in words


@dataclass(frozen=True)
class Finding:
    """Something the scan of the files found before any model was built."""

    # "non-finite" and "duplicate-layer" make a layer broken; notes are "constant", "surplus-layers", "layers-unknown",
    # "identical-checkpoint" and "identical-layer"
    kind: str
    message: str
    layer: int | None = None
    tensor: str | None = None


@dataclass(frozen=True)
class Run:
    """All that was measured on one checkpoint; `verdict.judge` turns it into an AuditResult."""

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


def run_from(about: Mapping[str, Any], **measured: Any) -> Run:
    """A Run from its description as JSON values (lists where the record has tuples) and what was measured."""
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


@dataclass(frozen=True)
class LayerVerdict:
    """What is said about one layer. `gap` > 0: the deciding reference has the lower loss."""

    layer: int
    verdict: str  # one of VERDICTS
    reason: str
    advice: str
    score: float | None = None  # orders layers, higher = more under-optimised
    gap: float | None = None
    gap_interval: tuple[float, float] | None = None
    reference: Reference | None = None
    sublayer: str | None = None  # "attention", "mlp", "block", or None where nothing is to blame
    effective_bits: float | None = None
    own_bits: float | None = None
    fvu: float | None = None
    drop_cost: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bound:
    """The loss that one peeled path reaches on `eval`, and what it gains beyond the head control (> 0: better)."""

    target_map: tuple[int, ...]
    ce: float
    gap: float
    gap_interval: tuple[float, float]


@dataclass(frozen=True)
class Bounds:
    """What the peeled paths say of the network; losses on `eval`, each with its own refitted head."""

    control: float  # the trained blocks under a refitted head
    head_gap: float  # what that gains over the network as trained…
    head_interval: tuple[float, float]
    head_allowance: float  # …and what it may gain where nothing is amiss but the text
    yes: Bound  # of the map with the least loss on `select`
    last: Bound | None  # of the map that aims every layer at the last state, where it was peeled
    beaten: int  # of the maps that were peeled, those of a higher loss than the trained network's
    peeled: int
    threshold: float  # what a gap must exceed to count
    running_minimum: float | None = None  # the least YES bound of this and all earlier checkpoints of the run


@dataclass(frozen=True)
class NetworkVerdict:
    """What is said about the network as a whole."""

    ce: float | None
    perplexity: float | None
    entropy: float | None
    flags: tuple[str, ...] = ()  # "untrained", "broken", "unconverged"
    notes: tuple[str, ...] = ()
    data_fit: str = "unknown"  # "own", "foreign" or "unknown"
    zone: str | None = None  # "red", "yellow" or "green"; None where no path was peeled
    bounds: Bounds | None = None


@dataclass(frozen=True)
class LayerChange:
    """What became of one layer since an earlier audit, on the same tokens.

    `gap_change` is that of one reference, the same in both, paired by sequence; above 0 where it does better against
    the layer than it did.
    """

    layer: int
    status: str  # one of CHANGES: "missing" was audited then and not now, "new" the other way round
    before: str | None  # the verdict then…
    after: str | None  # …and now
    reason: str = ""  # in words; empty where nothing changed
    gap_change: float | None = None
    gap_change_interval: tuple[float, float] | None = None
    reference: Reference | None = None  # whose gaps are compared


@dataclass(frozen=True)
class Comparison:
    """What changed since an earlier audit of the same network."""

    checkpoint: str
    checkpoint_id: str
    step: int | None
    is_baseline: bool  # whether it was named as such, or is just the audit before
    layers: tuple[LayerChange, ...]
    ce_change: float | None = None  # of the network's loss on `eval`; above 0 it has got worse
    ce_change_interval: tuple[float, float] | None = None
    new_flags: tuple[str, ...] = ()  # of the network
    notes: tuple[str, ...] = ()

    @property
    def regressed(self) -> tuple[int, ...]:
        """The layers that `--fail-on regressed` flags: those that got worse, and those that are missing."""
        return tuple(change.layer for change in self.layers if change.status in ("regressed", "missing"))


@dataclass(frozen=True)
class AuditResult:
    """A run with its verdicts: what the reports render."""

    run: Run
    network: NetworkVerdict
    layers: tuple[LayerVerdict, ...]
    flagged: tuple[int, ...]  # layers flagged under the policy
    network_flagged: bool = False
    comparison: Comparison | None = None  # with the audit before it, or with a baseline
    unmoved: tuple[
        int, ...
    ] = ()  # layers that were then what they are now, byte for byte, while others moved

    def loss_with(self, reference: Reference) -> float:
        """The mean loss on `eval` with a reference in place; KeyError where the run did not measure it."""
        losses = {score.reference: score.nll_eval for score in self.run.scores}[reference]
        return sum(losses) / len(losses)

    def gap_of(self, reference: Reference) -> float:
        """How much lower the loss on `eval` is with a reference in place; below 0 where it is higher."""
        return sum(self.run.nll_eval) / len(self.run.nll_eval) - self.loss_with(reference)

    def path_gaps(self) -> list[tuple[tuple[int, ...], float]]:
        """The maps whose weights are kept, the head control's () first: how much lower the loss on `eval` is."""
        bounds, paths = self.network.bounds, self.run.paths
        if bounds is None or paths is None:
            return []
        trained = sum(self.run.nll_eval) / len(self.run.nll_eval)
        kept = {(): bounds.control, bounds.yes.target_map: bounds.yes.ce}
        if bounds.last is not None:
            kept[bounds.last.target_map] = bounds.last.ce
        return [(target_map, trained - ce) for target_map, ce in kept.items()]


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
