"""What does a map cost? All 128 maps of a fully connected net in one walk, against each map on its own with pinv.

    python tests/bench/paths_cost.py [--write] [--repeats 5] [--threads 1]

8 layers of width 100, 800 samples: a net that was just trained (PyTorch's own initial weights, Adam, 1000 steps), and
its twin at random initial weights of He's scale, which has fewer dead units. Goal: 10 times faster on the trained
net, the same numbers (1e-4 relative). The two ways take turns, so that both see the same machine; processor time.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from results import parser, publish, run_child, table

if TYPE_CHECKING:
    from torch import Tensor

GOAL, TOLERANCE = 10.0, 1e-4
NUM_LAYERS, WIDTH, INPUT_WIDTH, NUM_SAMPLES, STEPS = 8, 100, 20, 800, 1000


def net(trained: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """X (20, 800), the outputs of layers 1…7 (100, 800), and the labels (100, 800) of a two-layer teacher."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(INPUT_WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    widths = [INPUT_WIDTH] + [WIDTH] * NUM_LAYERS
    layers = [nn.Linear(d_in, d_out) for d_in, d_out in zip(widths, widths[1:], strict=False)]
    for layer in (teacher[0], teacher[2], *(() if trained else layers)):
        nn.init.kaiming_normal_(layer.weight)
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]
    inputs = torch.randn(NUM_SAMPLES, INPUT_WIDTH)
    labels = teacher(inputs).detach()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(STEPS if trained else 0):
        optimizer.zero_grad()
        (model(inputs) - labels).square().sum(dim=1).mean().backward()
        optimizer.step()
    states, outputs = [], inputs
    for part in model:
        outputs = part(outputs).detach()
        if isinstance(part, nn.ReLU):
            states.append(outputs.T.contiguous())
    return inputs.T.contiguous(), states, labels.T.contiguous()


def alone(inputs: Tensor, targets: list[Tensor], target_map: tuple[int, ...]) -> float:
    """One map on its own, as the predecessor fits it: W = T·pinv([Z; 1])."""
    import torch

    outputs, one = inputs, torch.ones(1, inputs.shape[1])
    for layer, target in enumerate(target_map, start=1):
        extended = torch.cat([outputs, one])
        outputs = (targets[target - 1] @ torch.linalg.pinv(extended)) @ extended
        outputs = outputs.relu() if layer < len(target_map) else outputs
    return float((outputs - targets[-1]).square().sum()) / inputs.shape[1]


def measure(trained: bool, repeats: int) -> dict[str, object]:
    """Seconds of each way, by turns, how far their numbers are apart, and what the walk did. Runs in a child."""
    from peelcli.fitting.target_maps import all_maps, count_fits, peel_all
    from peelcli.references.least_squares import LeastSquares

    inputs, states, labels = net(trained)
    maps, targets = list(all_maps(NUM_LAYERS)), [*states, labels]
    walk_seconds, alone_seconds = [], []
    for _ in range(repeats + 1):  # the first turn warms up and is not counted
        began = time.process_time()
        fit = LeastSquares(states, labels)
        walk = {p.target_map: p.bound for p in peel_all(fit, fit.start(inputs), maps)}
        between = time.process_time()
        each = {m: alone(inputs, targets, m) for m in maps}
        walk_seconds.append(between - began)
        alone_seconds.append(time.process_time() - between)
    apart = max(abs(walk[m] / each[m] - 1.0) for m in maps)
    dead = sum(int((state == 0).all(dim=1).sum()) for state in states)
    return {
        "walk": walk_seconds[1:],
        "alone": alone_seconds[1:],
        "apart": apart,
        "fits": count_fits(maps),
        "dead": dead,
    }


def main() -> None:
    """Measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--child", choices=["trained", "random"])
    args = options.parse_args()
    if args.child:
        json.dump(measure(args.child == "trained", args.repeats), sys.stdout)
        return
    rows, ratios, apart = [], {}, 0.0
    for name in ("trained", "random"):
        child = [__file__, "--child", name, "--repeats", str(args.repeats)]
        found = json.loads(run_child(child, threads=args.threads).stdout)
        walk, each = min(found["walk"]), min(found["alone"])
        ratios[name], apart = each / walk, max(apart, found["apart"])
        fits = f"{found['fits']} / {2 ** (NUM_LAYERS - 1) * NUM_LAYERS}"
        rows.append(
            (
                name,
                found["dead"],
                fits,
                f"{walk:.3f}",
                f"{each:.3f}",
                f"{each / walk:.1f}",
                f"{found['apart']:.1e}",
            )
        )
    header = ("net", "dead units", "fits", "one walk, s", "pinv, s", "times faster", "apart, relative")
    text = f"All 128 maps, processor time, best of {args.repeats}, {args.threads} thread(s).\n\n" + table(
        header, rows
    )
    met = ratios["trained"] >= GOAL and apart <= TOLERANCE
    text += f"\n\nGoal ({GOAL:.0f} times faster on the trained net, {TOLERANCE} apart at most): "
    text += "met." if met else "MISSED."
    publish("paths_cost", text, write=args.write)


if __name__ == "__main__":
    main()
