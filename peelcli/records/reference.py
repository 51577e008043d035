"""References, the outcomes of their fits, and their measured losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SUBLAYERS = ("attention", "mlp")
KINDS = ("identity", "direct", "span", "challenge", "rescale", "exchange", "rollback")
# Nothing is fitted, and nothing but the checkpoint is needed to replay them.
WITHOUT_WEIGHTS = ("identity", "exchange")


@dataclass(frozen=True)
class Trained:
    """The layer runs with its own weights."""


@dataclass(frozen=True)
class Stored:
    """The layer runs with the weights that the fit has stored for the reference."""


@dataclass(frozen=True)
class Other:
    """The layer runs with the weights of another layer of the checkpoint."""

    layer: int


@dataclass(frozen=True)
class Dropped:
    """The layer runs without these sublayers; with both of them dropped it passes its input on."""

    sublayers: tuple[str, ...] = SUBLAYERS

    @property
    def is_block(self) -> bool:
        """Whether nothing of the block is left."""
        return self.sublayers == SUBLAYERS


LayerWeights = Trained | Stored | Other | Dropped


@dataclass(frozen=True)
class Reference:
    """A reference that replaces a part of the checkpoint: layers `layer`…`target`, or one sublayer of `layer`.

    `sublayer` is None for whole blocks; `scheme` is None where the reference has no weights of its own
    (`identity`) or keeps the checkpoint's precision (`challenge`, `rescale`, `exchange`,
    `rollback`). `bits` is per weight of
    the part replaced (0 for `identity`, the scheme's bits divided by the number of layers for `span`). `origin_*` say
    which earlier checkpoint of the run a `rollback` comes from: the first 12 hexadecimal digits of its id, its step.
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
    def is_drop(self) -> bool:
        """Whether something is left out and nothing replaces it (layer ablation)."""
        return self.kind == "identity"

    @property
    def grid(self) -> tuple[str | None, int | None]:
        """The scheme of its weights and the group size."""
        return (self.scheme, self.group_size)

    @property
    def is_span(self) -> bool:
        """Whether one fitted block replaces several layers (layer merge)."""
        return self.kind == "span"

    @property
    def is_challenge(self) -> bool:
        """Whether the layer is trained on alone, by the loss of the network (single-layer fine-tune)."""
        return self.kind == "challenge"

    @property
    def is_rollback(self) -> bool:
        """Whether the block comes from an earlier checkpoint of the run."""
        return self.kind == "rollback"

    @property
    def is_exchange(self) -> bool:
        """Whether two layers of the checkpoint change places (layer swap)."""
        return self.kind == "exchange"

    def orders_schemes(self, scheme: str) -> bool:
        """Whether it is a layer in another scheme than the run's: that only shows how many bits the layer needs."""
        return self.kind == "direct" and self.scheme != scheme

    def weights_at(self, layer: int) -> LayerWeights:
        """What `layer` runs with while this reference is in place."""
        if not self.layer <= layer <= self.target:
            return Trained()
        if self.is_exchange:  # of any two layers: those between them stay
            is_end = layer in (self.layer, self.target)
            return Other(self.layer + self.target - layer) if is_end else Trained()
        if self.is_drop:
            return Dropped((self.sublayer,) if self.sublayer else SUBLAYERS)
        # The first block of a span does the work of those after it.
        return Stored() if layer == self.layer else Dropped()

    @property
    def key(self) -> str:
        """A name that is unique within a run and a valid HDF5 group name, such as `direct-003-attention-ternary`."""
        part = self.sublayer or "block"
        layers = f"{self.layer:03d}" if self.target == self.layer else f"{self.layer:03d}to{self.target:03d}"
        return "-".join(filter(None, (self.kind, layers, part, self.scheme, self.origin_id)))


@dataclass(frozen=True)
class FitOutcome:
    """The outcome of one fit. `fvu_*`: fraction of the variance of the layers' update that is left unexplained."""

    start: str  # "warm", "fresh", "trained" (end to end), "earlier" (rollback) or "none" (identity: nothing is fitted)
    steps: int
    converged: bool
    reason: str  # why it stopped, in words
    fvu_fit: float | None = None
    fvu_eval: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Score:
    """A reference's losses per sequence with it in place, paired with the run's own losses.

    What decides nothing is measured on some sequences of `eval` alone, evenly spread: see `stride`.
    `kl_eval` is KL(trained ‖ with the reference), the mean over each sequence's positions, in nats per token.
    """

    reference: Reference
    fit: FitOutcome
    nll_select: tuple[float, ...]
    nll_eval: tuple[float, ...]
    kl_eval: tuple[float, ...]

    def beside(self, nll_eval: Sequence[float]) -> tuple[float, ...]:
        """The run's own losses on the `eval` sequences that this reference was measured on."""
        return tuple(nll_eval[:: self.stride(len(nll_eval))])

    def stride(self, total: int) -> int:
        """The indices of the measured `eval` sequences, of `total`: every n-th from the first, n = `eval_stride`."""
        # They are ⌈total / stride⌉, and stride is at most total / 8.
        return max(1, -(-total // max(1, len(self.nll_eval))))


@dataclass(frozen=True)
class PathScore:
    """A network of peeled blocks and a light head: its losses per sequence, paired with the run's own.

    `target_map` is empty for the head control: the trained blocks with a refitted head.
    """

    target_map: tuple[int, ...]
    fits: tuple[FitOutcome, ...]  # of layers 1…K (none for the control), then of the head
    unexplained: tuple[float, ...]  # per layer, the share of its target's variance left over on `eval`
    nll_select: tuple[float, ...]
    nll_eval: tuple[float, ...]


@dataclass(frozen=True)
class Paths:
    """The peeled paths of one checkpoint: the head control, and every fitted map."""

    control: PathScore
    scores: tuple[PathScore, ...]
    schemes: tuple[str, ...]  # that the block of each layer lies in: the layer's own
    left_out: tuple[str, ...] = ()  # maps that were asked for and not peeled, and why, in words
    num_fits: int = 0  # of blocks, those of the search's segments included
    seconds: float = 0.0
