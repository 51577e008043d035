"""What do the Triton kernels save on a GPU? Each against its eager twin on the same card, in one run.

    python tests/bench/kernels_cost.py [--write] [--rows 4096] [--columns 14336]

Needs a CUDA device and Triton; without one it says so and measures nothing. Goal: coordinate descent 20 times faster
than its twin, and faster than GPTQ's loop over the same weight in plain torch (Frantar et al., arXiv 2210.17323,
algorithm 1, blocks of 128 columns; its factorisation of the hessian is not counted).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from results import parser, publish, table

if TYPE_CHECKING:
    from torch import Tensor

GOAL = 20.0
GPTQ_BLOCK = 128


def gptq_loop(weight: Tensor, step: Tensor, factor: Tensor) -> Tensor:
    """A weight (d_out, d_in) rounded to 4 bits column by column; factor: Cholesky's, upper, of the inverse hessian."""
    left, rounded = weight.clone(), weight.clone()
    for start in range(0, left.shape[1], GPTQ_BLOCK):
        here = slice(start, min(start + GPTQ_BLOCK, left.shape[1]))
        block, local = left[:, here].clone(), factor[here, here]
        errors = block.clone()
        for j in range(block.shape[1]):
            column = block[:, j : j + 1]
            value = (column / step).round().clamp(-8, 7) * step
            rounded[:, start + j : start + j + 1] = value
            error = (column - value) / local[j, j]
            block[:, j:] -= error @ local[j : j + 1, j:]
            errors[:, j : j + 1] = error
        left[:, here.stop :] -= errors @ factor[here, here.stop :]
    return rounded


def measure(rows: int, columns: int) -> str:
    """The figures, as text; runs in a child process, which may import torch."""
    import torch

    from peelcli.quant.fake_quantize import eager_fake_quantize
    from peelcli.quant.initial_scale import initial_scale
    from peelcli.quant.kernels import eager, triton_descent, triton_fake_quantize
    from peelcli.quant.levels import level_table, nearest_levels
    from peelcli.quant.schemes import SCHEMES
    from peelcli.records.quant_spec import QuantSpec

    def seconds(work: Callable[[], object], repeats: int = 5) -> float:
        """The least time of several, after one that compiles."""
        work()
        found = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        return min(found)

    torch.manual_seed(0)
    weight = torch.randn(rows, columns, device="cuda")
    x = torch.randn(2 * columns, columns, device="cuda")
    hessian = x.T @ x / len(x)
    del x
    found: list[tuple[object, ...]] = []

    def row(what: str, by_twin: float, by_kernel: float) -> None:
        found.append((what, f"{by_twin * 1e3:.2f}", f"{by_kernel * 1e3:.2f}", f"{by_twin / by_kernel:.1f}"))

    for name in ("ternary", "int4", "nf4"):
        scheme = SCHEMES[name]
        levels = level_table(scheme, weight)
        group_of = torch.arange(columns, device="cuda") // 128
        scale = initial_scale(weight, QuantSpec(scheme.name, 128))
        codes = nearest_levels(weight / scale[:, group_of], scheme)
        gradient = eager.gradient_of(codes, scale, None, weight, hessian, group_of)
        times = [
            seconds(
                lambda v=version, c=codes, s=scale, b=gradient, lv=levels, g=group_of: v.coordinate_descent_(
                    c.clone(), s, b.clone(), hessian, lv, g
                ),
                repeats=3,
            )
            for version in (eager, triton_descent)
        ]
        row(f"descent, one sweep, {name}, groups of 128", *times)
        factor = eager.upper_factor(hessian + torch.eye(columns, device="cuda"))
        args = (scale, None, weight, factor, levels, group_of)
        times = [
            seconds(lambda v=version, a=args: v.round_with_feedback(*a), repeats=2)
            for version in (eager, triton_descent)
        ]
        row(f"rounding with feedback, {name}", *times)
    # Any upper triangle will do: its values cost nothing.
    factor = torch.eye(columns, device="cuda") + 0.001 * hessian.triu(1)
    step = initial_scale(weight, QuantSpec("int4"))
    loop = seconds(lambda: gptq_loop(weight, step, factor), repeats=2)
    found.append(("GPTQ's loop, int4, one scale a row", f"{loop * 1e3:.2f}", "", ""))
    for dtype in (torch.float32, torch.bfloat16):
        value, ternary = weight.to(dtype), SCHEMES["ternary"]
        scale = initial_scale(weight, QuantSpec(ternary.name, 128))

        def both(function: Callable[..., torch.Tensor], v: torch.Tensor, s: torch.Tensor) -> None:
            latent, steps = v.detach().requires_grad_(), s.detach().requires_grad_()
            function(latent, steps).sum().backward()

        times = [
            seconds(lambda f=f, v=value, s=scale: both(f, v, s))
            for f in (
                lambda w, s, q=ternary: eager_fake_quantize(w, s, QuantSpec(q.name, 128)),
                lambda w, s, q=ternary: triton_fake_quantize.fake_quantize(w, s, q.levels, q.reach, 128),
            )
        ]
        row(f"fake quantisation forward and backward, {dtype}".replace("torch.", ""), *times)
    header = ("work", "eager, ms", "kernel, ms", "times faster")
    text = f"A {rows} × {columns} weight on {torch.cuda.get_device_name()}.\n\n{table(header, found)}"
    return f"{text}\n\nGoal: descent at least {GOAL:.0f} times faster."


def main() -> None:
    """Measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=4096)
    options.add_argument("--columns", type=int, default=14336, help="a multiple of 128")
    options.add_argument(
        "--here", action="store_true", help="measure in this process, and print only the figures"
    )
    args = options.parse_args()
    if args.here:
        print(measure(args.rows, args.columns))
        return
    probe = "import torch; print(torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() != "True":
        raise SystemExit(
            "no CUDA device here: kernels are tested in Triton's interpreter, and timed on a GPU only"
        )
    command = [sys.executable, __file__, "--here", "--rows", str(args.rows), "--columns", str(args.columns)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    publish("kernels", done.stdout, write=args.write)


if __name__ == "__main__":
    main()
