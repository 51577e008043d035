"""The direct solver against its peers on the same work: error of each block's linear maps, CE, and time.

    python tests/bench/solver_peers.py [--write] [--models stories llama100m] [--bits 4 3 2 ternary] [--groups 128]

Peers are needed here alone: pip install -c constraints.txt llmcompressor hqq auto-round, with torch==2.13.0 in the
constraints. Where one is not installed, or fails, its cell says so. Block after block is quantised on the tokens that
the quantised blocks before it give; every method but AutoRound is given the same inputs and only its own work is
timed (processor seconds, one thread). AutoRound runs its own loop over the same tokens. Error: ‖(V − W) x‖² / ‖W x‖²
over held-out tokens of the trained model, the mean over all maps. `llama100m` has random weights (width 768, 12
layers) and is cut to its first --blocks blocks. AutoRound leaves maps as they are whose width is no multiple of 32:
of stories260K's the 15 of the MLPs, so that its column there is of 20 maps quantised and 15 free. `--only self_attn`
compares all on the attentions alone.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from results import ROOT, STORIES, parser, publish, run_child, table

METHODS = ("nearest", "gptq", "gptq-mse", "hqq", "autoround", "solver-0", "solver-1", "solver")
ABOUT = {
    "nearest": "round to nearest, steps of least squared error",
    "gptq": "llm-compressor's GPTQ, order by activation, its min-max steps",
    "gptq-mse": "the same with steps of least squared error",
    "hqq": "HQQ, without data, with zero points",
    "autoround": "AutoRound, which leaves maps unquantised whose width is no multiple of 32 (of stories: the MLPs')",
    "solver-0": "this solver from one step size, rounding with feedback and the best scale alone",
    "solver-1": "this solver from one step size",
    "solver": "this solver",
}


def main() -> None:
    """Measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["stories", "llama100m"])
    options.add_argument("--bits", nargs="+", default=["4", "3", "2", "ternary"])
    options.add_argument("--groups", nargs="+", default=["channel", "128"])
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options.add_argument("--blocks", type=int, default=2, help="blocks of llama100m")
    options.add_argument("--tokens", type=int, default=8192)
    options.add_argument("--only", default="", help="quantise the maps with this in their names")
    options.add_argument("--autoround-iters", type=int, default=200)
    args = options.parse_args()
    if not STORIES.exists():
        raise SystemExit("../shared/data/stories260K-hf is not there: put it beside the checkout")
    text = "Lower is better; processor seconds of one thread.\n\n"
    text += "\n".join(f"- {name}: {ABOUT[name]}" for name in args.methods) + "\n\n"
    with tempfile.TemporaryDirectory() as work:
        asked = Path(work) / "asked.json"
        for model in args.models:
            asked.write_text(json.dumps({**vars(args), "model": model, "stories": str(STORIES)}))
            child, columns = str(ROOT / "tests" / "bench" / "solver_peer.py"), []
            for method in args.methods:
                done = run_child([child, str(asked), method], threads=1)
                columns.append(json.loads(done.stdout.strip().splitlines()[-1]))
            settings = [(bits, group) for bits in args.bits for group in args.groups]
            rows = [
                (*setting, *cells)
                for setting, cells in zip(settings, zip(*columns, strict=True), strict=True)
            ]
            header = ("bits", "group", *args.methods)
            text += f"{model}; in each cell error, CE, seconds:\n\n" + table(header, rows) + "\n\n"
    name = f"solver_peers_{args.only}" if args.only else "solver_peers"
    publish(name, text, write=args.write)


if __name__ == "__main__":
    main()
