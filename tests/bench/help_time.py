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
    walls = [run_child(["-m", "peelcli", "--help"], threads=1).wall for _ in range(args.repeats)]
    bare = min(run_child(["-c", "pass"], threads=1).wall for _ in range(args.repeats))
    loaded = run_child(["-c", LOADED], threads=1).stdout.splitlines()[-1].removeprefix("loaded:").split()
    rows = [
        ("peel --help", f"{min(walls):.3f}", f"{statistics.median(walls):.3f}"),
        ("python -c pass", f"{bare:.3f}", ""),
    ]
    met = min(walls) < GOAL and not {"torch", "transformers"} & set(loaded)
    text = table(("command", f"best of {args.repeats}, s", "median, s"), rows)
    text += f"\n\nOf {', '.join(LIBRARIES)} it imports: {', '.join(loaded) or 'none'}.\n\n"
    text += f"Goal (best under {GOAL} s, torch and transformers not imported): {'met' if met else 'MISSED'}."
    publish("help_time", text, write=args.write)


if __name__ == "__main__":
    main()
