"""What does an audit of a large network cost on a GPU? A random Llama of 1B parameters or of the shape of one of 7B.

    python tests/bench/gpu_audit.py [--write] [--shape 1b 7b] [--tokens 65536] [--layers 22]

Needs a CUDA device; without one it says so and measures nothing. The weights are random and so is the text; the head is
scaled down, so that the network is as unsure as it should be and every kind of reference is fitted. Goals: 3 minutes
for 1B, 10 minutes for the shape of 7B; the gradient fit of a block at 40% of the card's rate of a bfloat16 product.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from audit_cost import stages
from results import ROOT, parser, publish, run_child, table

# Layers, width, width of the MLP, heads, heads of keys and values.
SHAPES = {
    "tiny": (3, 64, 160, 4, 2),
    "1b": (22, 2048, 5632, 32, 4),
    "7b": (32, 4096, 11008, 32, 32),
}
GOALS = {"1b": 180.0, "7b": 600.0}
VOCAB_SIZE = 32000
STEPS = (5, 35)  # of two fits: what they differ by is the time of the steps alone


def make(directory: Path, shape: str, num_layers: int, num_tokens: int, device: str) -> None:
    """A random checkpoint in bfloat16, and tokens beside it; in a child process, which may import torch."""
    import torch
    from models import save_tokens
    from transformers import LlamaConfig, LlamaForCausalLM

    _, width, inner, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.get_output_embeddings().weight.data.mul_(0.1)
    model.save_pretrained(directory)
    save_tokens(directory.with_name("ids.npy"), num_tokens, VOCAB_SIZE)
    print(sum(p.numel() for p in model.parameters()))


def fit_rate(directory: Path, activations: Path, device: str) -> dict[str, float]:
    """Operations a second of a bfloat16 product, and of the products of a ternary fit of layer 1, one step a batch."""
    import time

    import torch

    from peelcli.checkpoint.model import BlockwiseModel
    from peelcli.fitting.block import ModelBlock
    from peelcli.fitting.cached_states import CachedStates, StateData
    from peelcli.quant.schemes import SCHEMES
    from peelcli.records.quant_spec import QuantSpec
    from peelcli.references.interface import Budget
    from peelcli.references.regression import fit_regression, step_sizes
    from peelcli.runtime.batch_sizes import fit_batch
    from peelcli.storage.activations import ActivationFile

    side = 8192 if device == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    products = []
    for _ in range(12):
        began = clock()
        a @ b
        products.append(2 * side**3 / (clock() - began))
    acts = ActivationFile(activations)
    with tempfile.TemporaryDirectory() as offload:
        dtype = torch.bfloat16
        model = BlockwiseModel(directory, dtype=dtype, device=device, offload_dir=Path(offload))
        held = CachedStates(acts, model.device, dtype)
        fit, select = (StateData(held, part, 0, 1) for part in ("fit", "select"))
        seconds = []
        with model.block(1) as module:
            block = ModelBlock(model, 1, module)
            for steps in (2, *STEPS):  # the first compiles
                batch, sizes = fit_batch(model.device), step_sizes(SCHEMES["ternary"], "warm", closely=True)
                budget = Budget(steps, batch_size=batch, seed=0, start="warm", **sizes)
                began = clock()
                fit_regression(block, block.maps, QuantSpec("ternary"), fit, select, budget)
                seconds.append(clock() - began)
            numel = sum(m.weight.numel() for m in block.maps)
    tokens = fit_batch(model.device) * acts.ids.shape[1]
    step = (seconds[-1] - seconds[-2]) / (STEPS[1] - STEPS[0])
    return {"product": sorted(products)[6], "step": step, "fit": 6 * numel * tokens / step, "tokens": tokens}


def audit(
    shape: str, num_layers: int, tokens: int, device: str
) -> tuple[tuple[object, ...], tuple[object, ...], dict[str, float]]:
    """A row of the table of audits, one of the table of fits, and the seconds of each stage."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        here = [str(Path(__file__).resolve()), "--here"]
        made = ["make", str(work / "model"), shape, str(num_layers), str(2 * tokens), device]
        numel = int(run_child([*here, *made], threads=16).stdout.split()[-1])
        command = ["-m", "peelcli", "audit", str(work / "model"), "--data", str(work / "ids.npy")]
        command += ["--tokens", str(tokens), "--device", device, "--output", str(work / "audit")]
        run = run_child(command, threads=16, allowed=(0, 1))
        states = next((work / "audit").rglob("acts-*.h5"))
        rate = json.loads(
            run_child([*here, "rate", str(work / "model"), str(states), device], threads=16).stdout
        )
    goal = GOALS.get(shape)
    met = "" if goal is None else "met" if run.wall <= goal else "MISSED"
    share = rate["fit"] / rate["product"]
    row = (shape, num_layers, f"{numel / 1e9:.2f}", tokens, f"{run.wall:.1f}", f"{goal or 0:.0f}", met)
    fit = (shape, int(rate["tokens"]), f"{rate['step'] * 1e3:.2f}", f"{rate['fit'] / 1e12:.0f}")
    fit += (f"{rate['product'] / 1e12:.0f}", f"{share:.2f}")
    seconds = stages(run.stderr, run.wall)
    print(row, fit, seconds, flush=True)  # the next shape may outlast a lease
    return row, fit, seconds


def main() -> None:
    """Measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["1b"])
    options.add_argument("--layers", type=int, help="instead of all of them")
    options.add_argument("--tokens", type=int, default=65536)
    options.add_argument("--device", default="cuda")
    options.add_argument("--here", nargs="+", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.here:
        sys.path.insert(0, str(ROOT))
        if args.here[0] == "make":
            make(Path(args.here[1]), args.here[2], int(args.here[3]), int(args.here[4]), args.here[5])
        else:
            print(json.dumps(fit_rate(Path(args.here[1]), Path(args.here[2]), args.here[3])))
        return
    if args.device == "cuda":
        probe = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
        card = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip()
        if not card:
            raise SystemExit("no CUDA device here: nothing is measured")
    else:
        card = args.device
    rows, fits, by_stage = [], [], {}
    for shape in args.shape:
        row, fit, by_stage[shape] = audit(shape, args.layers or SHAPES[shape][0], args.tokens, args.device)
        rows.append(row)
        fits.append(fit)
    header = ("shape", "layers", "parameters, 1e9", "tokens", "audit, s", "goal, s", "")
    text = (
        f"On {card}; the whole process, from a checkpoint on disk to the report.\n\n{table(header, rows)}\n\n"
    )
    names = list(dict.fromkeys(name for found in by_stage.values() for name in found))
    staged = [(name, *(f"{found.get(name, 0.0):.1f}" for found in by_stage.values())) for name in names]
    text += table(("stage, wall seconds", *by_stage), staged)
    header = ("fit of a block", "tokens a step", "ms a step", "TFLOP/s", "of a product", "share (goal .40)")
    publish("gpu_audit", f"{text}\n\n{table(header, fits)}", write=args.write)


if __name__ == "__main__":
    main()
