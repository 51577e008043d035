"""Replay a witness: put a stored reference into the checkpoint, run it plainly, and compare the gap with the report's.

Nothing of the sweep is used again: the checkpoint is run from its embedding to its loss, with and without the
reference, on the token ids that the fit kept.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.errors import ReplayError
from peelcli.records import Score, Stored
from peelcli.records.progress import Progress
from peelcli.references.interface import Replacement
from peelcli.scoring.replay import mean_nll, path_mean_nll
from peelcli.storage.fit_writer import read_eval_ids
from peelcli.storage.parts import load_weights
from peelcli.storage.path_parts import load_path

ABSOLUTE, RELATIVE = 1e-3, 0.02  # nats, and share of the gap, that another machine's rounding may make


@dataclass(frozen=True)
class Replay:
    """One witness measured again; gaps in nats per token, > 0 where it has the lower loss."""

    name: str
    reported: float
    measured: float

    @property
    def holds(self) -> bool:
        """Whether the reported gap came back."""
        return abs(self.measured - self.reported) <= ABSOLUTE + RELATIVE * abs(self.reported)


def run_verify(
    fit: Path,
    model: BlockwiseModel,
    gaps: Sequence[tuple[Score, float]],
    paths: Sequence[tuple[Sequence[int], float]],
    batch_size: int,
) -> Generator[Progress, None, list[Replay]]:
    """Measure references and peeled paths again, each with its reported gap. Raises ReplayError where one differs.

    gaps: each is measured on the sequences of `eval` that it was measured on. paths: target maps, () for the head
    control; their gaps are against the network as trained.
    """
    ids = read_eval_ids(fit)
    total = len(gaps) + len(paths) + 1
    yield Progress("verify", 0, total, "as trained")
    trained = {1: mean_nll(model, ids, batch_size, None, Replacement())}  # by the stride of the sequences
    found = []
    for done, (score, reported) in enumerate(gaps, start=1):
        reference, stride = score.reference, score.stride(len(ids))
        yield Progress("verify", done, total, reference.key)
        is_stored = isinstance(reference.weights_at(reference.layer), Stored)
        replacement = load_weights(fit, reference) if is_stored else Replacement()
        some = ids[::stride]
        if stride not in trained:
            trained[stride] = mean_nll(model, some, batch_size, None, Replacement())
        measured = trained[stride] - mean_nll(model, some, batch_size, reference, replacement)
        found.append(Replay(f"layer {reference.layer}: {reference.key}", reported, measured))
    for done, (target_map, reported) in enumerate(paths, start=1 + len(gaps)):
        name = f"path {list(target_map)}" if target_map else "head control"
        yield Progress("verify", done, total, name)
        blocks, head = load_path(fit, target_map)
        measured = trained[1] - path_mean_nll(model, ids, batch_size, blocks, head)
        found.append(Replay(name, reported, measured))
    yield Progress("verify", total, total, "all witnesses")
    failed = [r for r in found if not r.holds]
    if failed:
        lines = [f"{r.name}: reported {r.reported:+.5f}, measured {r.measured:+.5f}" for r in failed]
        raise ReplayError(
            f"{fit}: {len(failed)} of {len(found)} witnesses did not reproduce their gap (nats per token):",
            *lines,
            "The fit and the checkpoint do not belong together, or the file was changed. Fit again.",
        )
    return found
