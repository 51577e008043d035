"""Do intervals and flags mean what they say, over draws of the tokens that an audit is run on?

    python tests/bench/coverage.py --cache DIR [--draws 2000] [--write]

A small sound decoder of the planted-fault suite and its references are measured on all of its corpus: the truth. Then
as few sequences as an audit has are drawn from them again and again. Goals: 92% to 98% of the 95% intervals of a gap
hold its value on all of them; at most 5% of the audits flag anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from planted.cases import BASES
from results import parser, publish, run_child, table

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZES = (32, 64, 128)
EVAL_TOKENS = 300_000
LOWEST, HIGHEST, MOST_FLAGGED = 0.92, 0.98, 0.05
AUDITS_SHARE = 4  # one audit is judged for so many draws of an interval


def measure(name: str, cache: Path, draws: int) -> dict[str, Any]:
    """Coverage of each reference, and the share of audits that flag anything, by number of sequences. In a child."""
    import torch
    from decoders import train
    from planted.detect import audit

    from peelcli.config import ExtractConfig, FitConfig
    from peelcli.storage.fit_reader import read_fit

    torch.set_num_threads(1)
    recipe = BASES[name].recipe
    directory = train(recipe, SHARED, cache)[recipe.steps]
    extract = ExtractConfig(data=(SHARED / recipe.corpus,), seq_len=128, eval_tokens=EVAL_TOKENS, threads=1)
    kinds = ("identity", "direct", "challenge", "rescale", "exchange")
    fit = FitConfig(references=kinds, ladder=False, screen=False, paths=("none",), threads=1)
    run = read_fit(audit(directory, extract, fit, cache / "coverage" / name))
    return {
        "covered": covered(run, draws),
        "flagged": [flagged(run, size, draws // AUDITS_SHARE) for size in SIZES],
    }


def covered(run: Any, draws: int) -> dict[str, list[float]]:
    """Of every reference, the share of intervals that hold its gap on all sequences, by the size of a draw."""
    import numpy as np

    from peelcli.verdict.statistics import paired_interval

    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for score in run.scores:
        gaps = np.subtract(run.nll_eval, score.nll_eval)
        if not gaps.any():
            continue  # a challenge that kept the trained weights: there is nothing to hold
        row = []
        for size in SIZES:
            hits = 0
            for _ in range(draws):
                # With replacement: the corpus stands for all text like it.
                interval = paired_interval(rng.choice(gaps, size).tolist())
                hits += interval.low <= gaps.mean() <= interval.high
            row.append(hits / draws)
        found[score.reference.key] = row
    return found


def flagged(run: Any, size: int, audits: int) -> float:
    """The share of audits on `size` sequences, and half as many to choose by, that flag a layer of the sound model."""
    from dataclasses import replace

    import numpy as np

    from peelcli.verdict import judge

    rng = np.random.default_rng(1)
    count = 0
    for _ in range(audits):
        select, evaluated = (rng.integers(len(run.nll_eval), size=n) for n in (size // 2, size))

        def drawn(values: tuple[float, ...], rows: np.ndarray) -> tuple[float, ...]:
            return tuple(np.asarray(values)[rows].tolist())

        scores = tuple(
            replace(
                s,
                nll_select=drawn(s.nll_eval, select),
                nll_eval=drawn(s.nll_eval, evaluated),
                kl_eval=drawn(s.kl_eval, evaluated),
            )
            for s in run.scores
        )
        drawn_run = replace(
            run,
            scores=scores,
            nll_select=drawn(run.nll_eval, select),
            nll_eval=drawn(run.nll_eval, evaluated),
            entropy_eval=drawn(run.entropy_eval, evaluated),
        )
        count += bool(judge(screened(drawn_run)).flagged)
    return count / audits


def screened(run: Any) -> Any:
    """The run as an audit would have measured it: what a part of `eval` settles on that part alone."""
    from dataclasses import replace

    from peelcli.scoring.two_stage import PART
    from peelcli.verdict import SCREENED, Policy, settled

    def cut(score: Any) -> Any:
        part = {name: getattr(score, name)[::PART] for name in ("nll_eval", "kl_eval")}
        return replace(score, nll_select=(), **part)

    parts = [cut(s) for s in run.scores if s.reference.kind in SCREENED]
    keys = settled(parts, run.nll_eval, run.unigram_ce, run.num_layers, Policy())
    return replace(run, scores=tuple(cut(s) if s.reference.key in keys else s for s in run.scores))


def main() -> None:
    """Measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--cache", type=Path, required=True, help="that of planted_faults.py")
    options.add_argument("--draws", type=int, default=2000)
    options.add_argument("--bases", nargs="*", choices=list(BASES), default=["llama4", "gpt5"])
    options.add_argument("--child")
    args = options.parse_args()
    if args.child:
        json.dump(measure(args.child, args.cache, args.draws), sys.stdout)
        return
    rows, worst, most = [], [], 0.0
    for name in args.bases:
        child = [__file__, "--cache", str(args.cache), "--draws", str(args.draws), "--child", name]
        measured = json.loads(run_child(child, threads=1).stdout)
        found = list(measured["covered"].values())
        for place, size in enumerate(SIZES):
            column = sorted(row[place] for row in found)
            worst += [column[0], column[-1]]
            mean = sum(column) / len(column)
            share = measured["flagged"][place]
            most = max(most, share)
            rows.append(
                (
                    name,
                    size,
                    len(column),
                    f"{mean:.3f}",
                    f"{column[0]:.3f}",
                    f"{column[-1]:.3f}",
                    f"{share:.3f}",
                )
            )
    text = table(
        ("model", "sequences", "references", "mean coverage", "least", "most", "audits that flag"), rows
    )
    met = min(worst) >= LOWEST and max(worst) <= HIGHEST
    text += f"\n\nGoal ({LOWEST:.0%} to {HIGHEST:.0%} of 95% intervals, for every reference): "
    text += "met." if met else "MISSED."
    text += f"\n\nGoal (at most {MOST_FLAGGED:.0%} of the audits of sound layers flag anything): "
    publish("coverage", text + ("met." if most <= MOST_FLAGGED else "MISSED."), write=args.write)


if __name__ == "__main__":
    main()
