"""How long does `peel --help` take? Wall time of the whole process, best of ten. Goal: under 0.3 s, without torch.

python tests/bench/help_time.py [--write]
"""

from __future__ import annotations

import statistics

from results import parser, publish, run_child, table

GOAL = 0.3
LIBRARIES = ("torch", "transformers", "h5py", "numpy", "rich")
LOADED = f"""
import sys
from peelcli.cli.main import main
sys.argv = ["peel", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *[name for name in {LIBRARIES!r} if name in sys.modules])
"""


def main() -> None:
    """Measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=10)
    args = options.parse_args()
    commands = {"peel --help": ["-m", "peelcli", "--help"], "python -c pass": ["-c", "pass"]}
    runs = {
        name: [run_child(command, threads=1) for _ in range(args.repeats)]
        for name, command in commands.items()
    }
    loaded = run_child(["-c", LOADED], threads=1).stdout.splitlines()[-1].removeprefix("loaded:").split()
    rows = []
    for name, found in runs.items():
        walls = [run.wall for run in found]
        figures = (min(walls), statistics.median(walls), min(run.cpu for run in found))
        rows.append((name, *(f"{seconds:.3f}" for seconds in figures)))
    best = min(run.wall for run in runs["peel --help"])
    met = best < GOAL and not {"torch", "transformers"} & set(loaded)
    text = table(("command", f"best of {args.repeats}, s", "median, s", "least processor time, s"), rows)
    text += f"\n\nOf {', '.join(LIBRARIES)} it imports: {', '.join(loaded) or 'none'}.\n\n"
    text += f"Goal (best under {GOAL} s, torch and transformers not imported): {'met' if met else 'MISSED'}."
    publish("help_time", text, write=args.write)


if __name__ == "__main__":
    main()
