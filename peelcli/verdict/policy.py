"""The thresholds: every number that a verdict depends on stands here."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN_BITS = 16.0
"""Bits per weight of a layer of which the checkpoint does not say how it is stored."""
SAME_BITS = 1e-6
"""Bits of a layer are a mean over its matrices; two that differ by no more than this are the same but for rounding."""
TINY = 1e-12
"""In a ratio, a smaller denominator is replaced by this, so that nothing is divided by zero."""
UNTOUCHED_TRAVEL = 1e-3
"""Vectors that have moved less than this share of the others' distance count as not moved at all."""
BROKEN_SCORE = 1024.0
"""The score of a broken layer. It lies above that of every layer that is not broken (see `score_limit`)."""
LARGEST_CE = 700.0
"""A larger loss, in nats, has a perplexity that no float can hold; the perplexity of this one is given instead."""


@dataclass(frozen=True)
class Policy:
    """What flags a layer, and how certain that must be. Shares are of what the same reference costs other layers."""

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
    """The level of every interval. One minus this bounds the chance that noise flags any sound layer of a run."""
    matched_margin: float | None = None
    """Nats per token that a match may cost. With None the shares below set it, for each reference anew."""
    identity_share: float = 0.10
    """A block does no work where dropping it costs less than this share of the median over the other layers' blocks."""
    sublayer_share: float = 0.10
    """Attention or MLP does no work where dropping it costs less than this share of the median of the other layers and
    its weights are unlike theirs in size (see `unlike_size`)."""
    unlike_size: float = 0.3
    """Weights are unlike those of the other layers where the natural logarithm of the ratio of sizes exceeds this: they
    are a quarter smaller or a third larger."""
    like_size: float = 0.1
    """The sentence on a layer leaves out the size of its weights where the logarithm of its ratio to the others' is
    no more than this."""
    idle_share: float = 0.03
    """A block, attention or MLP whose weights are like the others' in size matches only below this share, dropped or
    fitted. Many are idle by nature and cost more than that."""
    fitted_share: float = 0.15
    """A fitted reference matches below this share of what the same reference costs the other layers."""
    least_usual: float = 0.002
    """A fitted reference that costs the other layers fewer nats than this fits any layer, so it can match none."""
    divergence_factor: float = 2.0
    """A match must leave the predictions alone, too: their divergence stays below this many times the margin."""
    effective_share: float = 0.02
    """`effective_bits` are those of the cheapest reference that costs less than this share of dropping a layer."""
    least_share: float = 0.10
    """Where the other layers give no measure, the usual cost of a drop is this share of a layer's even part of what the
    network gains over token frequencies."""
    unsettled_factor: float = 2.0
    """A layer is undecided where a fit that had not converged costs less than this many times the margin."""
    surpassed_floor: float = 0.005
    """Nats by which the loss must fall at least for a reference to surpass a layer. In few bits a sound attention or
    MLP may do better by less (by .0035 measured)."""
    rollback_floor: float = 0.001
    """Nats by which the loss must fall at least with an older block. It is not fitted, so it gains by nothing else."""
    challenge_floor: float = 0.01
    """Nats that a layer must gain at least, trained alone, beyond what the other layers gain in the median."""
    challenge_share: float = 1.0
    """Trained alone, a layer must gain more than the others by at least this share of their median gain. The share
    shrinks to nothing as the size of its weights becomes unlike theirs."""
    challenge_worth: float = 0.03
    """Trained alone, a layer must gain more than the others by this share of what dropping it costs. A layer that does
    most of the work, as the first does, has most to gain."""
    same_precision_bits: float = 0.5
    """The gain of a layer trained alone is compared with layers that have no fewer bits. A layer with fewer by up to
    this still counts, for one matrix may be kept in another precision."""
    young_lag: float = 0.15
    """A layer is young where its biases and norms lie nearer to where training starts than the others': by this much
    more (natural logarithm) than any other layer's distance strays from the rest."""
    young_floor: float = 0.005
    """Nats that a young layer (see `young_lag`) must gain beyond the others, trained alone, whatever the larger shares
    ask for."""
    untouched_factor: float = 2.0
    """A layer or part that training never reached, by its biases and norms, does no work where dropping it costs less
    than this many times `identity_share` or `sublayer_share`."""
    rescale_floor: float = 0.005
    """Nats that a layer must gain at least when its matrices are rescaled."""
    rescale_factor: float = 1.5
    """A layer must gain more than this many times what rescaling gains any other layer."""
    rescale_worth: float = 0.01
    """A layer must gain by rescaling more than this share of what dropping it costs. One that does most of the work has
    most to gain."""
    wreck_factor: float = 2.0
    """A finding is attributed to another layer where that layer gains more than this many times as much."""
    blame_factor: float = 3.0
    """Within a flagged block, attention or MLP is named where the evidence against it is this many times that against
    the other."""
    rollback_factor: float = 2.0
    """An older block must gain more than this many times what blocks of the same checkpoint gain other layers."""
    foreign_gap: float = 1.25
    """The text is foreign to the model where its loss exceeds its own uncertainty by more than this, in nats."""
    foreign_share: float = 0.10
    """On foreign text a reference must gain at least this share of the loss in excess of the model's uncertainty."""
    own_gap: float = 0.5
    """Nats by which the loss exceeds the model's uncertainty when `foreign_share` begins to count. It counts in part
    from here, and in full from `foreign_gap`."""
    untrained_gap: float = 0.05
    """A network is untrained where its blocks together gain fewer nats than this and it does no better than token
    frequencies. It is damaged where it is better without its blocks by more than this."""
    untrained_repair: float = 2.0
    """A network is not untrained where the repair of one layer brings the loss below that of token frequencies by this
    many times `untrained_gap`."""
    wreck_lead: float = 1.15
    """In a damaged network the layer at fault gains this many times what any other layer gains, trained alone."""
    wreck_size: float = 0.44
    """Where no repair stands out in a damaged network, one layer is at fault if its weights differ in size from the
    others' by more than this (natural logarithm) and no other's differ nearly as much (see `wreck_unlike`)."""
    wreck_unlike: float = 1.5
    """In a damaged network, the weights of the layer at fault differ in size this many times as much as any other's."""
    head_floor: float = 0.1
    """A network has not converged where a refitted head alone gains more nats than this, and than the text explains."""
    new_flag_share: float = 0.10
    """A flag is new where what its reference costs has fallen by more than this share, and by `surpassed_floor`."""
    grown_share: float = 0.50
    """Without a new flag a layer has regressed where what its reference costs has fallen by more than this share and by
    `grown_floor`."""
    grown_floor: float = 0.01
    """Without a new flag a layer has regressed only where its reference's cost has fallen by more nats than this."""
    min_sequences: int = 8
    """Fewer sequences on `eval` decide nothing."""
    found_score: float = 0.9
    """Layers with a finding score this or more, all others this or less. A match costs at most a tenth of the usual."""
    score_limit: float = 100.0
    """Scores are cut off here. Where the other layers cost nothing, ratios to them grow without bound."""
    screening_errors: float = 4.0
    """A part of `eval` settles a reference only where its cost is beyond the threshold by this many standard errors."""
    screening_share: float = 0.5
    """A part of `eval` settles a reference only where it costs more than this share of the usual. By default a match
    costs less than a third of that."""
    few_bits: float = 8.0
    """A network counts as stored in few bits where its layers have no more than this in the median."""
    more_bits_factor: float = 2.0
    """In a network in few bits, a note names each layer that has more than this many times the median."""
    min_layers: int = 3
    """Of fewer layers no median says what is usual: no note compares them."""
    adaptation_floor: float = 0.02
    """A note says that training any single layer helps where that gains the layers this many nats in the median."""
    stale_floor: float = 0.005
    """A note says that older blocks help everywhere where those of one checkpoint gain this many nats in the median."""
