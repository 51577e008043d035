"""What does a whole audit cost? `peel audit` on a small real checkpoint, with an empty cache, by threads and by stage.

    python tests/bench/audit_cost.py [--write] [--threads 1 2]

Needs ../shared/data beside the checkout. Goals, on two free processors: 90 s of wall time, 1.5 GB at most.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from results import STORIES, Measured, parser, publish, run_child, table

GOAL_SECONDS, GOAL_BYTES = 90.0, 1.5e9


def stages(stderr: Sequence[tuple[float, str]], end: float) -> dict[str, float]:
    """Seconds of each stage, by the first line of progress (such as "fit 0/5 layer 1") of each."""
    begun: list[tuple[str, float]] = [("start", 0.0)]
    for when, line in stderr:
        stage, _, rest = line.partition(" ")
        if rest.partition(" ")[0].count("/") == 1 and stage != begun[-1][0]:
            begun.append((stage, when))
    ends = [when for _, when in begun[1:]] + [end]
    seconds: dict[str, float] = {}
    for (stage, start), stop in zip(begun, ends, strict=True):
        seconds[stage] = seconds.get(stage, 0.0) + stop - start
    return seconds


def audit(threads: int) -> Measured:
    """One audit in a child process with a cache directory of its own; a flagged layer (exit code 1) is no failure."""
    data = STORIES.with_name("tinystories.txt")
    with tempfile.TemporaryDirectory() as cache:
        command = ["-m", "peelcli", "audit", str(STORIES), "--data", str(data), "--threads", str(threads)]
        return run_child(command, threads=threads, env={"XDG_CACHE_HOME": cache}, allowed=(0, 1))


def main() -> None:
    """Measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = options.parse_args()
    if not STORIES.exists():
        raise SystemExit("../shared/data/stories260K-hf is not there: put it beside the checkout")
    runs = {threads: audit(threads) for threads in args.threads}
    most = runs[max(runs)]
    met = most.wall <= GOAL_SECONDS and most.peak <= GOAL_BYTES
    rows = [
        (n, f"{run.wall:.1f}", f"{run.cpu:.1f}", f"{run.peak / 1e6:.0f}", run.returncode)
        for n, run in runs.items()
    ]
    text = "stories260K on tinystories.txt, all settings as they are unasked; the whole process.\n\n"
    text += table(("--threads", "wall, s", "processor, s", "peak, MB", "exit code"), rows) + "\n\n"
    by_stage = {n: stages(run.stderr, run.wall) for n, run in runs.items()}
    names = list(dict.fromkeys(name for found in by_stage.values() for name in found))
    rows = [(name, *(f"{found.get(name, 0.0):.1f}" for found in by_stage.values())) for name in names]
    text += table(("stage, wall seconds", *(f"--threads {n}" for n in by_stage)), rows)
    text += f"\n\nGoal ({GOAL_SECONDS:.0f} s and {GOAL_BYTES / 1e9} GB on two free processors, --threads {max(runs)}): "
    text += "met." if met else "MISSED."
    publish("audit_cost", text, write=args.write)


if __name__ == "__main__":
    main()
