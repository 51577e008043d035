"""Do intervals mean what they say? How often a 95% interval of a gap holds its value on a very large token set.

    python tests/bench/coverage.py --cache DIR [--draws 2000] [--write]

A small decoder of the planted-fault suite and its references are measured on all of its corpus; that is the truth.
Then as few sequences as an audit has are drawn from them again and again. Goal: 92% to 98% of the intervals.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from planted.cases import BASES
from results import parser, publish, run_child, table

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZES = (32, 64, 128)
EVAL_TOKENS = 300_000
LOWEST, HIGHEST = 0.92, 0.98


def measure(name: str, cache: Path, draws: int) -> dict[str, list[float]]:
    """Coverage of each reference by number of sequences, as the verdicts' own intervals have it. In a child."""
    import numpy as np
    import torch
    from decoders import train

    from peelcli.audit import audit_steps
    from peelcli.config import ExtractConfig, FitConfig
    from peelcli.fitstore import read_fit
    from peelcli.statistics import paired_interval
    from peelcli.workspace import Workspace

    torch.set_num_threads(1)
    recipe = BASES[name].recipe
    directory = train(recipe, SHARED, cache)[recipe.steps]
    extract = ExtractConfig(data=(SHARED / recipe.corpus,), seq_len=128, eval_tokens=EVAL_TOKENS, threads=1)
    fit = FitConfig(references=("identity", "direct"), ladder=False, paths=("none",), threads=1)
    steps = audit_steps(directory, extract, fit, Workspace(cache / "coverage" / name, directory))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            run = read_fit(end.value.fit)
            break
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for score in run.scores:
        gaps = np.subtract(run.nll_eval, score.nll_eval)
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
    rows, worst = [], []
    for name in args.bases:
        child = [__file__, "--cache", str(args.cache), "--draws", str(args.draws), "--child", name]
        found = list(json.loads(run_child(child, threads=1).stdout).values())
        for place, size in enumerate(SIZES):
            column = sorted(row[place] for row in found)
            worst += [column[0], column[-1]]
            mean = sum(column) / len(column)
            rows.append((name, size, len(column), f"{mean:.3f}", f"{column[0]:.3f}", f"{column[-1]:.3f}"))
    text = table(("model", "sequences", "references", "mean coverage", "least", "most"), rows)
    met = min(worst) >= LOWEST and max(worst) <= HIGHEST
    text += f"\n\nGoal ({LOWEST:.0%} to {HIGHEST:.0%} of 95% intervals, for every reference): "
    publish("coverage", text + ("met." if met else "MISSED."), write=args.write)


if __name__ == "__main__":
    main()
