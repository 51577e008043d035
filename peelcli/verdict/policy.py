"""The thresholds: every number that a verdict depends on stands here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """What flags, and how sure one must be. Shares are of what the same kind of reference costs the other layers."""

    fail_on: tuple[str, ...] = (
        "broken",
        "surpassed",
        "matched",
        "untrained",
        "damaged",
        "unconverged",
        "red",
    )
    """The verdicts that count as flags."""
    confidence: float = 0.95
    """Of every interval, and one minus the chance that any sound layer of a run is flagged by sampling noise."""
    matched_margin: float | None = None
    """Nats per token that a match may cost; None: the shares below."""
    identity_share: float = 0.10
    """A block whose dropping costs less than this share of the median of the other layers does no work…"""
    sublayer_share: float = 0.10
    """…nor attention or MLP alone, where its weights are small besides…"""
    unlike_size: float = 0.3
    """…by this, the natural logarithm of their size relative to the others': a quarter smaller, or a third larger."""
    idle_share: float = 0.03
    """Where its weights are like the others' a part must cost less than this share, dropped or fitted: many are idle by
    nature, and cost more."""
    fitted_share: float = 0.15
    """A fitted reference matches below this share of what the same reference costs the other layers."""
    least_usual: float = 0.002
    """A fitted reference that costs the other layers less than this, in nats, can match none: it fits anything."""
    divergence_factor: float = 2.0
    """A match must also leave the predictions alone: its divergence stays below this many times the margin."""
    effective_share: float = 0.02
    """`effective_bits` is of the cheapest reference that costs less than this share of what dropping costs others."""
    least_share: float = 0.10
    """Where the other layers give no measure, dropping counts against this share of a layer's even part of the gain."""
    unsettled_factor: float = 2.0
    """A fit that had not converged leaves a layer undecided where it costs less than this many times the margin."""
    surpassed_floor: float = 0.005
    """Nats by which the loss must fall at least: in few bits a sound part may do better by less (by .0035 measured)."""
    rollback_floor: float = 0.001
    """The same for a rollback: it is not fitted, and so has nothing else to gain by."""
    challenge_floor: float = 0.01
    """Nats by which a layer's challenge must gain more than the others', at least…"""
    challenge_share: float = 1.0
    """…and this share of what the others gain in the median, less where the size of its weights is unlike theirs…"""
    challenge_worth: float = 0.03
    """…and of what dropping the layer costs: one that does most of the work, as the first does, has most to gain."""
    young_lag: float = 0.15
    """Its biases and norms lag behind where they lie nearer to where training starts than the others', by this much
    more (natural logarithm) than any other layer's stray from those: then it need gain no more…"""
    young_floor: float = 0.005
    """…than this many nats beyond the others, and a part of it that lags is idle at `sublayer_share`."""
    untouched_factor: float = 2.0
    """What training never reached, by its biases and norms, does no work where dropping costs less than this many times
    those shares."""
    rescale_floor: float = 0.005
    """Nats that a layer must gain by other lengths of its matrices alone, at least…"""
    rescale_factor: float = 1.5
    """…this many times what any other layer gains so…"""
    rescale_worth: float = 0.01
    """…and this share of what dropping the layer costs: one that does most of the work has most to gain."""
    wreck_factor: float = 2.0
    """What surpasses elsewhere is put down to layers that gain more than this many times that, trained or exchanged."""
    blame_factor: float = 3.0
    """One part of a block is to blame where something speaks this many times as much for it as for the other."""
    rollback_factor: float = 2.0
    """A rollback must gain more than this many times what blocks of the same step gain other layers in the median."""
    foreign_gap: float = 1.25
    """Nats by which the loss may exceed the model's own uncertainty before the text counts as foreign to it."""
    foreign_share: float = 0.10
    """On foreign text a reference must gain at least this share of that excess to surpass…"""
    own_gap: float = 0.5
    """…and from this excess up, where the text is still the model's own, a part of it that grows to the whole."""
    untrained_gap: float = 0.05
    """A network is untrained where its blocks together gain less than this, and it does no better than frequencies; it
    is damaged where without them it is better by more."""
    wreck_lead: float = 1.15
    """In a damaged network the layer to blame must gain this many times what any other does, trained alone…"""
    wreck_size: float = 0.44
    """…or be alone in having weights so unlike the others' in size (natural logarithm)…"""
    wreck_unlike: float = 1.5
    """…and so many times as unlike as those of any other."""
    head_floor: float = 0.1
    """Nats that a refitted head must gain, and more than the text's mismatch, for a network to be unconverged."""
    new_flag_share: float = 0.10
    """A flag is new where what its reference costs has fallen by more than this share, and by `surpassed_floor`…"""
    grown_share: float = 0.50
    """…and a layer has regressed without one where that has fallen by more than this share of it…"""
    grown_floor: float = 0.01
    """…and by more than this, in nats."""
    min_sequences: int = 8
    """Fewer sequences on `eval` decide nothing."""
