"""What stands in for a part of the checkpoint, how its fit went, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SUBLAYERS = ("attention", "mlp")
KINDS = ("identity", "direct", "span", "challenge", "rescale", "exchange", "rollback")
WITHOUT_WEIGHTS = (
    "identity",
    "exchange",
)  # nothing is fitted, and nothing but the checkpoint is needed to replay them


@dataclass(frozen=True)
class Reference:
    """What stands in for a part of the checkpoint: layers `layer`…`target`, or one sublayer of `layer`.

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
    def grid(self) -> tuple[str | None, int | None]:
        """The scheme of its weights and the group size."""
        return (self.scheme, self.group_size)

    @property
    def dropped(self) -> tuple[str, ...]:
        """The sublayers that contribute nothing with it in place: of `identity` alone."""
        if self.kind != "identity":
            return ()
        return (self.sublayer,) if self.sublayer else SUBLAYERS

    def bypasses(self, layer: int) -> bool:
        """Whether `layer` lies behind the block that has done its work already."""
        return self.kind != "exchange" and self.layer < layer <= self.target

    def stands_at(self, layer: int) -> bool:
        """Whether `layer` runs with other weights, or less of it: two layers do in an `exchange`."""
        return layer == self.layer or (self.kind == "exchange" and layer == self.target)

    @property
    def key(self) -> str:
        """A name that is unique within a run and safe as an HDF5 group name, such as `direct-003-attention-ternary`."""
        part = self.sublayer or "block"
        layers = f"{self.layer:03d}" if self.target == self.layer else f"{self.layer:03d}to{self.target:03d}"
        return "-".join(filter(None, (self.kind, layers, part, self.scheme, self.origin_id)))


@dataclass(frozen=True)
class FitOutcome:
    """How the fit of one reference went. `fvu_*` is the share of the layers' update left unexplained."""

    start: str  # "warm", "fresh", "trained" (end to end), "earlier" (rollback) or "none" (identity: nothing is fitted)
    steps: int
    converged: bool
    reason: str  # why it stopped, in words
    fvu_fit: float | None = None
    fvu_eval: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Score:
    """One reference, measured in place: per-sequence losses, paired with the run's own.

    What decides nothing is measured on some sequences of `eval` alone, evenly spread: see `stride`.
    `kl_eval` is KL(trained ‖ with the reference), the mean over each sequence's positions, in nats per token.
    """

    reference: Reference
    fit: FitOutcome
    nll_select: tuple[float, ...]
    nll_eval: tuple[float, ...]
    kl_eval: tuple[float, ...]

    def beside(self, nll_eval: Sequence[float]) -> tuple[float, ...]:
        """The run's own losses on the sequences of `eval` that this reference was measured on."""
        return tuple(nll_eval[:: self.stride(len(nll_eval))])

    def stride(self, total: int) -> int:
        """Of `total` sequences of `eval` the reference was measured on every so-manyth, from the first on."""
        # They are ⌈total / stride⌉, and stride is at most total / 8.
        return max(1, -(-total // max(1, len(self.nll_eval))))


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
