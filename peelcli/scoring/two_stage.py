"""All references of a fit measured: those that a part of `eval` settles on that part, the others on every token."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.records import FitOutcome, Score
from peelcli.records.progress import Progress
from peelcli.scoring.sweep import Candidate, Losses, Sweep
from peelcli.storage.activations import ActivationFile
from peelcli.verdict.policy import Policy
from peelcli.verdict.screening import SCREENED, settled

PART = 4  # one sequence of `eval` in so many settles what is far from deciding anything
_ANY = FitOutcome("none", 0, True, "")


def part_stride(acts: ActivationFile) -> int:
    """Every so-manyth sequence of `eval` is enough where little is asked of a figure; never too few to say anything."""
    rows = acts.rows["eval"]
    return max(1, min(PART, len(range(rows.start, rows.stop)) // Policy.min_sequences))


def run_measurement(
    model: BlockwiseModel,
    acts: ActivationFile,
    candidates: Sequence[Candidate],
    scratch: Path,
    *,
    key: str,
    batch_size: int,
    screen: bool,
    policy: Policy,
) -> Generator[Progress, None, Losses]:
    """The losses of all candidates; yields as it goes. screen: settle on a part what `policy` settles there."""

    def sweep_of(some: Sequence[Candidate], stage: str) -> Sweep:
        return Sweep(model, acts, some, scratch, key=key, batch_size=batch_size, stage=stage)

    stride = part_stride(acts)
    screened = [c for c in candidates if c.eval_stride == 1 and c.reference.kind in SCREENED]
    if not (screen and screened and stride > 1):
        sweep = sweep_of(candidates, "score")
        yield from sweep.run()
        return sweep.losses
    first = sweep_of([replace(c, eval_stride=stride) for c in screened], "screen")
    yield from first.run()
    found = first.losses
    scores = [
        Score(c.reference, _ANY, (), tuple(found.nll[k].tolist()), tuple(found.kl[k].tolist()))
        for c in screened
        for k in (c.reference.key,)
    ]
    nll_eval = acts.nll[acts.rows["eval"]].tolist()
    keys = settled(scores, nll_eval, acts.about["unigram_ce"], model.num_layers, policy)
    second = sweep_of([c for c in candidates if c.reference.key not in keys], "score")
    yield from second.run()
    return Losses(
        nll=found.nll | second.losses.nll,
        kl=found.kl | second.losses.kl,
        fvu_eval=found.fvu_eval | second.losses.fvu_eval,
    )
