"""Do 20 gradient steps and the direct solver reach what 150 steps alone do? `fvu` of each layer's `direct` reference.

    python tests/bench/solver_fits.py [--write] [--layers 1-5] [--scheme ternary]

Needs ../shared/data beside the checkout. The states are extracted with all settings as they are unasked; `fvu` is
read on `eval`, which no fit has seen. "150 steps alone" is the fit as it was before there was a solver (momentum 0.9,
rate 0.03); what the new step sizes do without the solver stands beside it. Processor seconds of one thread.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from results import ROOT, STORIES, parser, publish, run_child, table

from peelcli.references.regression import CLOSE_STEPS
from peelcli.runtime.batch_sizes import fit_batch

# (name, of the budget, solver)
NOW = {"steps": 20, "batch_size": fit_batch(torch.device("cpu"), closely=True), **CLOSE_STEPS}
FITS = (
    ("150 steps alone", {"steps": 150, "learning_rate": 0.03, "batch_size": 4}, False),
    ("20 steps alone", NOW, False),
    ("20 steps, solver", NOW, True),
)

CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {bench!r})
import torch
from solver_fits import FITS
from peelcli.storage.activations import ActivationFile
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.fitting.block import ModelBlock
from peelcli.quant.schemes import scheme_named
from peelcli.records.quant_spec import QuantSpec
from peelcli.references import regression
from peelcli.references.peeled_block import residual_maps
from peelcli.references.interface import Budget
from peelcli.references.refine import Finish
from peelcli.fitting.cached_states import HeldStates, StateData

torch.set_num_threads(1)
work, scheme = Path({work!r}), scheme_named({scheme!r})
acts = ActivationFile(work / "acts.h5")
model = BlockwiseModel(Path({stories!r}), dtype=torch.float32, device="cpu", offload_dir=work / "offload")
held = HeldStates(acts, model.device, model.dtype)
for layer in {layers}:
    data = [StateData(held, part, layer - 1, layer) for part in ("fit", "select", "eval")]
    for d in data:
        d.batch([0])
    with model.block(layer) as module:
        block = ModelBlock(model, layer, module)
        few = data[0].batch([0])
        residual = residual_maps(block, few.inputs, few.ids)
        for _, about, solver in FITS:
            began = time.process_time()
            finish = Finish(block, residual, data[0], about["batch_size"], rounds=2) if solver else None
            budget = Budget(**about, seed=0, start="warm")
            witness, _ = regression.fit_regression(
                block, block.maps, QuantSpec(scheme.name), data[0], data[1], budget, finish
            )
            seconds = time.process_time() - began
            print(layer, regression.fvu(block, witness.weights(block.maps[0].weight), data[2], 8), seconds, flush=True)
"""


def main() -> None:
    """Measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    options.add_argument("--scheme", default="ternary")
    args = options.parse_args()
    if not STORIES.exists():
        raise SystemExit("../shared/data/stories260K-hf is not there: put it beside the checkout")
    rows, met = [], []
    with tempfile.TemporaryDirectory() as work:
        text_file = str(STORIES.with_name("tinystories.txt"))
        extract = ["extract", str(STORIES), "--data", text_file, "-o", str(Path(work) / "acts.h5")]
        run_child(["-m", "peelcli", *extract, "--threads", "1"], threads=1)
        about = {"bench": str(ROOT / "tests" / "bench"), "work": work, "scheme": args.scheme}
        child = CHILD.format(**about, stories=str(STORIES), layers=args.layers)
        found = [line.split() for line in run_child(["-c", child], threads=1).stdout.splitlines()]
    for layer in args.layers:
        mine = [(float(v), float(s)) for n, v, s in found if int(n) == layer]
        met.append(mine[-1][0] <= mine[0][0])
        rows.append((layer, *(f"{v:.4f} in {s:.2f} s" for v, s in mine), "yes" if met[-1] else "NO"))
    text = f"stories260K on tinystories.txt, `direct` {args.scheme}, whole blocks; fvu on eval, processor seconds.\n\n"
    text += table(("layer", *(name for name, *_ in FITS), "no higher"), rows)
    goal = "20 steps and the solver no higher than 150 steps alone, on every layer"
    text += f"\n\nGoal ({goal}): {'met' if all(met) else 'MISSED, met'} on {sum(met)} of {len(met)} layers."
    publish("solver_fits", text, write=args.write)


if __name__ == "__main__":
    main()
