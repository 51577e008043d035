"""Does memory grow with depth? Peak resident memory of the extraction and of the scoring sweep, 4 layers and 32.

    python tests/bench/memory.py [--write]

A random Llama of width 512, the same tokens at every depth, each stage in a process of its own. The sweep carries three
`identity` candidates a layer (block, attention, MLP). Goal: the deeper model takes at most 15% more. Six minutes; needs
Linux.

Resident memory counts the pages of the checkpoint that are mapped, too. While transformers opens a model it maps the
whole file, and reads all of it where it casts, so that the peak contains the file; the system takes such pages back
whenever it needs them. `own` is the memory that it cannot take back.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

from results import Measured, parser, publish, run_child, table

GOAL = 1.15
SEQ_LEN = 64
TOKENS = {"fit": 32 * SEQ_LEN, "select": 8 * SEQ_LEN, "eval": 8 * SEQ_LEN}  # 8 sequences a part is the least
STAGES = ("extract", "score")


def resident(field: str) -> int:
    """A line of this process's status in bytes: VmRSS now, RssAnon (of it, not of a file), VmHWM (the most so far)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


class Watch(threading.Thread):
    """Looks at this process's own memory every few milliseconds; `peak` is the most that it saw, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._done = threading.Event()

    def run(self) -> None:
        """Look until `stop`."""
        while not self._done.wait(0.003):
            self.peak = max(self.peak, resident("RssAnon"))

    def stop(self) -> int:
        """End; returns the peak."""
        self._done.set()
        self.join()
        return self.peak


def make(directory: Path, num_layers: int, dtype: str) -> None:
    """Save the checkpoint and the tokens."""
    import torch
    from models import save_llama, save_tokens

    save_llama(directory / "checkpoint", num_layers, dtype=getattr(torch, dtype))
    save_tokens(directory / "tokens.npy", 4 * sum(TOKENS.values()))


def run_stage(directory: Path, stage: str) -> None:
    """One stage in this process; prints what was resident before it began and at its peak, and the weights' bytes."""
    from peelcli.config import ExtractConfig
    from peelcli.stages.extract import run_extract
    from peelcli.stages.inspection import open_and_scan
    from peelcli.stages.open_model import open_model
    from peelcli.stages.workspace import Workspace

    settings = ExtractConfig(
        data=(directory / "tokens.npy",), seq_len=SEQ_LEN, device="cpu", dtype="float32", threads=1,
        **{f"{part}_tokens": budget for part, budget in TOKENS.items()},
    )  # fmt: skip
    workspace = Workspace(directory / "work", directory / "checkpoint")
    imported = resident("VmRSS")
    watch = Watch()
    watch.start()
    opened = drive(
        open_and_scan(directory / "checkpoint", workspace)
    )  # read in the first stage, kept for the second
    acts = directory / "acts.h5"
    if stage == "extract":
        drive(run_extract(opened, settings, workspace, acts))
    else:
        drive(sweep_steps(open_model(opened, settings, workspace), acts, directory / "scratch"))
    figures = {"imported": imported, "peak": resident("VmHWM"), "own": watch.stop()}
    figures["weights"] = opened.scan.total_nbytes
    print(json.dumps(figures))


def sweep_steps(model, acts_path: Path, scratch: Path):  # type: ignore[no-untyped-def]
    """The sweep over every layer's identity references."""
    from peelcli.records import SUBLAYERS, Reference
    from peelcli.scoring.sweep import Candidate, Sweep
    from peelcli.storage.activations import ActivationFile

    references = [
        Reference("identity", layer, layer, part)
        for layer in range(1, model.num_layers + 1)
        for part in (None, *SUBLAYERS)
    ]
    acts = ActivationFile(acts_path)
    sweep = Sweep(
        model,
        acts,
        [Candidate(r, None) for r in references],
        scratch,
        key="bench",
        batch_size=4096 // SEQ_LEN,
    )
    yield from sweep.run()
    if len(sweep.losses.nll) != len(references):
        raise SystemExit("the sweep did not measure every candidate")


def drive(steps):  # type: ignore[no-untyped-def]
    """Run a stage to its end; returns its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def child(directory: Path, *args: str) -> Measured:
    """This script again, in a process of its own."""
    return run_child([__file__, "--child", str(directory), *args], threads=1)


def measure(num_layers: int, dtype: str) -> dict[str, dict[str, int]]:
    """Figures of each stage, in bytes."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        child(directory, "make", str(num_layers), dtype)
        return {stage: json.loads(child(directory, stage).stdout) for stage in STAGES}


def main() -> None:
    """Measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, nargs=2, default=(4, 32), metavar=("FEW", "MANY"))
    options.add_argument(
        "--stored", nargs="+", default=["float32", "bfloat16"], help="dtypes of the weights on disk"
    )
    args = options.parse_args()
    rows: list[tuple[str, ...]] = []
    worst = {"peak": 0.0, "own": 0.0}
    for dtype in args.stored:
        few, many = (measure(n, dtype) for n in args.layers)
        for stage in STAGES:
            cells = [f"{figures[stage]['weights'] / 1e6:.0f}" for figures in (few, many)]
            cells.append(f"{many[stage]['imported'] / 1e6:.0f}")
            for kind in worst:
                a, b = few[stage][kind], many[stage][kind]
                cells += [f"{a / 1e6:.0f}", f"{b / 1e6:.0f}", f"{b / a:.2f}"]
                worst[kind] = max(worst[kind], b / a)
            rows.append((dtype, stage, *cells))
    few, many = args.layers
    header = ("stored as", "stage", f"weights, {few} layers", f"{many} layers", "after imports")
    for kind in ("peak resident", "own"):
        header += (f"{kind}, {few} layers", f"{many} layers", "ratio")
    text = f"Megabytes; run in float32, {sum(TOKENS.values()):,} tokens of which {TOKENS['select'] + TOKENS['eval']:,} "
    text += f"are scored, one thread.\n\n{table(header, rows)}\n\nGoal (at {many} layers at most {GOAL:.2f} of {few}): "
    words = {kind: "met" if ratio <= GOAL else "MISSED" for kind, ratio in worst.items()}
    text += f"{words['own']} by own memory, {words['peak']} by resident memory. That counts the checkpoint's pages, "
    text += "too, which transformers maps as it opens a model and casts; the system takes them back when it needs them."
    publish("memory", text, write=args.write)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        where, what, *rest = sys.argv[2:]
        if what == "make":
            make(Path(where), int(rest[0]), rest[1])
        else:
            run_stage(Path(where), what)
    else:
        main()
