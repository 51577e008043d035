"""Verdicts on a checkpoint and its layers, and changes since another audit."""

from __future__ import annotations

from dataclasses import dataclass

from peelcli.records.reference import Reference, Score
from peelcli.records.run import Run

VERDICTS = ("broken", "surpassed", "matched", "undecided", "effective")
CHANGES = ("regressed", "missing", "better", "new", "same")


@dataclass(frozen=True)
class LayerVerdict:
    """The verdict on one layer. `gap` > 0: the deciding reference has a lower loss than the trained layer."""

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
    """The loss of one peeled path on `eval`, and its gain over the head control (> 0: better)."""

    target_map: tuple[int, ...]
    ce: float
    gap: float
    gap_interval: tuple[float, float]


@dataclass(frozen=True)
class Bounds:
    """The verdict on the peeled paths; losses on `eval`, each with its own refitted head."""

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
    """The verdict on the whole network."""

    ce: float | None
    perplexity: float | None
    entropy: float | None
    flags: tuple[str, ...] = ()  # "untrained", "damaged", "broken", "unconverged"
    notes: tuple[str, ...] = ()
    data_fit: str = "unknown"  # "own", "foreign" or "unknown"
    zone: str | None = None  # "red", "yellow" or "green"; None where no path was peeled
    bounds: Bounds | None = None
    path_rules: tuple[str, ...] = ()  # what `bounds` show: "unconverged", "red", "yellow"


@dataclass(frozen=True)
class LayerChange:
    """The change of one layer since an earlier audit on the same tokens.

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
    """The changes since an earlier audit of the same network."""

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
        """The layers that `--fail-on regressed` flags: layers that got worse, and layers that are missing."""
        return tuple(change.layer for change in self.layers if change.status in ("regressed", "missing"))


@dataclass(frozen=True)
class AuditResult:
    """A run with its verdicts, which the reports render."""

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
        """The mean loss on `eval` with a reference in place. Raises KeyError if the run did not measure it."""
        losses = self.score_of(reference).nll_eval
        return sum(losses) / len(losses)

    def gap_of(self, reference: Reference) -> float:
        """The fall of the loss on `eval` with a reference in place, in nats per token; negative if the loss rises."""
        trained = self.score_of(reference).beside(self.run.nll_eval)
        return sum(trained) / len(trained) - self.loss_with(reference)

    def score_of(self, reference: Reference) -> Score:
        """The score of a reference. Raises KeyError if the run did not measure it."""
        return {score.reference: score for score in self.run.scores}[reference]

    def path_gaps(self) -> list[tuple[tuple[int, ...], float]]:
        """Target map → fall of the loss on `eval`, for the maps with kept weights; the head control's () is first."""
        bounds, paths = self.network.bounds, self.run.paths
        if bounds is None or paths is None:
            return []
        trained = sum(self.run.nll_eval) / len(self.run.nll_eval)
        kept = {(): bounds.control, bounds.yes.target_map: bounds.yes.ce}
        if bounds.last is not None:
            kept[bounds.last.target_map] = bounds.last.ce
        return [(target_map, trained - ce) for target_map, ce in kept.items()]
