"""What does extracting cost beside running the model? `peel extract` against a forward pass that writes as much.

    python tests/bench/extract_cost.py [--write]

A: `run_extract`, the stage as the command runs it on a scanned checkpoint: open the model, read the token ids,
describe the checkpoint (which reads every weight once, to find low-bit grids), run, write. B: `from_pretrained` whole
in memory, the same batches, the same losses, and every hidden state written to a plain file. Both in one process,
alternating, one thread. Goal: A takes at most 1.3 times as long as B. The scan, which hashes every tensor before
anything is built, is a stage of its own and stands beside them.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from results import STORIES, parser, publish, run_child, table

GOAL = 1.3
PARTS = {"fit": 2, "select": 1, "eval": 2}
CASES = {
    "random Llama, width 512, 8 layers": (128, 10240),
    "stories260K": (256, 40960),
}  # name → seq_len, tokens
Timing = tuple[float, float]  # seconds: processor time, wall time


def timed(run: Callable[[], object]) -> Timing:
    """How long `run` takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def drive(steps):  # type: ignore[no-untyped-def]
    """Run a stage to its end; returns its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def plain_pass(checkpoint: Path, ids, batch_size: int, target: Path) -> int:  # type: ignore[no-untyped-def]
    """The model as transformers runs it, its losses and its hidden states; returns the bytes written."""
    import torch
    from transformers import AutoModelForCausalLM

    from peelcli.scoring.losses import predictive_entropy, token_losses

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    losses, written = [], 0
    with torch.no_grad(), target.open("wb") as out:
        for batch in ids.split(batch_size):
            result = model(input_ids=batch, use_cache=False, output_hidden_states=True)
            nll, log_p = token_losses(result.logits, batch)
            losses.append((nll, predictive_entropy(log_p)))
            written += sum(out.write(hidden.contiguous().numpy().data) for hidden in result.hidden_states)
    return written


def run_case(
    checkpoint: Path, seq_len: int, num_tokens: int, repeats: int, scratch: Path
) -> dict[str, list[Timing]]:
    """Timings of A and B, `repeats` each in turn after one of each unmeasured, and of the parts of A."""
    import torch

    from peelcli.config import ExtractConfig
    from peelcli.runtime.batch_sizes import block_batch
    from peelcli.stages.extract import run_extract
    from peelcli.stages.inspection import open_and_scan
    from peelcli.stages.open_model import open_model
    from peelcli.stages.workspace import Workspace
    from peelcli.storage.activations import ActivationFile

    tokens = {f"{part}_tokens": num_tokens * share // sum(PARTS.values()) for part, share in PARTS.items()}
    settings = ExtractConfig(data=(scratch / "tokens.npy",), seq_len=seq_len, device="cpu", dtype="float32",
                             threads=1, overwrite=True, **tokens)  # fmt: skip
    workspace = Workspace(scratch / "work", checkpoint)
    path, target = scratch / "acts.h5", scratch / "plain.states"
    found: dict[str, list[Timing]] = {"A": [], "B": [], "scan": [], "open the model": [], "describe": []}
    found["scan"].append(timed(lambda: drive(open_and_scan(checkpoint, workspace))))
    opened = drive(open_and_scan(checkpoint, workspace))
    extract = lambda: drive(run_extract(opened, settings, workspace, path))  # noqa: E731
    extract()
    acts = ActivationFile(path)
    ids, stored = acts.ids, len(acts.stored)
    acts.close()
    plain = lambda: plain_pass(checkpoint, ids, block_batch(seq_len, torch.device("cpu")), target)  # noqa: E731
    written, expected = plain(), path.stat().st_size
    if not 0.95 < written / expected <= 1:  # HDF5 adds a little; the last state is the one that both end with
        raise SystemExit(
            f"A wrote {expected} bytes in {stored} states and B {written}: they are not the same work"
        )
    for _ in range(repeats):
        found["A"].append(timed(extract))
        found["B"].append(timed(plain))
    model = open_model(opened, settings, workspace)
    found["open the model"] += [timed(lambda: open_model(opened, settings, workspace)) for _ in range(3)]
    found["describe"] += [timed(lambda: grids(model, opened.stored_bits)) for _ in range(3)]
    return found


def grids(model, stored_bits: float) -> None:  # type: ignore[no-untyped-def]
    """The part of `describe` that reads weights."""
    from peelcli.fitting.layer_weights import layer_grid

    for layer in range(1, model.num_layers + 1):
        layer_grid(model, layer, stored_bits, model.read_weights(layer))


def child(case: str, repeats: int) -> None:
    """One case in this process; prints its timings."""
    from models import save_llama, save_tokens

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        checkpoint, vocab_size = STORIES, 512
        if not case.startswith("stories"):
            checkpoint, vocab_size = scratch / "checkpoint", 1000
            save_llama(checkpoint, 8)
        save_tokens(scratch / "tokens.npy", 2 * CASES[case][1], vocab_size)
        print(json.dumps(run_case(checkpoint, *CASES[case], repeats, scratch)))


def spread(values: list[float]) -> str:
    """The median, and the least and the most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    """Measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5, help="measured runs of each kind")
    options.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = options.parse_args()
    rows, parts, met = [], [], True
    for case in args.cases:
        if case.startswith("stories") and not STORIES.exists():
            rows.append((case, "not there", "", "", "", ""))
            continue
        found = json.loads(run_child([__file__, "--child", case, str(args.repeats)], threads=1).stdout)
        for index, clock in enumerate(("processor", "wall")):
            a, b = ([timing[index] for timing in found[kind]] for kind in "AB")
            ratio = statistics.median(a) / statistics.median(b)
            pairs = [x / y for x, y in zip(a, b, strict=True)]
            met = met and (ratio <= GOAL or clock == "wall")
            rows.append(
                (case, clock, spread(a), spread(b), f"{ratio:.2f}", f"{min(pairs):.2f}–{max(pairs):.2f}")
            )
        medians = {name: statistics.median(t[0] for t in found[name]) for name in found if name not in "AB"}
        parts.append(f"{case}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items()))
    header = ("checkpoint", "clock", "A: extract, s", "B: plain, s", "A/B", "of single pairs")
    chosen = [(case, CASES[case]) for case in args.cases]
    sizes = "; ".join(f"{name}: {tokens:,} tokens, {length} a sequence" for name, (length, tokens) in chosen)
    text = f"{sizes}. In float32, one thread; medians of {args.repeats}, with least and most.\n\n"
    text += (
        table(header, rows)
        + "\n\n"
        + "\n".join(f"- Of A, and the scan beside it (processor time): {p}" for p in parts)
    )
    text += f"\n\nGoal (A/B at most {GOAL}, by processor time): {'met' if met else 'MISSED'}."
    publish("extract_cost", text, write=args.write)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]))
    else:
        main()
