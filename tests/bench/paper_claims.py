"""What the paper says of YES bounds, tried at a size that fits here (arXiv 2605.02853).

    python tests/bench/paper_claims.py --cache DIR [--write] [--threads 1] [--only llama-fp …]

4-layer LLaMA-style and GPT-2-style decoders on 100,000 characters of Shakespeare, in full precision, binary and
ternary, and twins in full precision with a hundredth of the learning rate. At some checkpoints all 8 maps are peeled,
from the trained weights ("warm") and, of the LLaMA-style ones, from random ones ("fresh"), fitted on training text,
chosen and read on text held out.

(a) by the end the training loss beats most maps; (b) some map beats the trained model at some checkpoints, after the
head control is taken off; (c) a run with too small a learning rate looks converged and is shown not to be, while its
twin with a sound rate is not flagged.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from decoders import Recipe, tokens, train
from results import parser, publish, run_child, table

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SAVED = (0, 50, 100, 200, 400, 800)
STEPS, FEW_STEPS = (
    (0, 100, 400, 800),
    (100, 800),
)  # that are peeled; few of the low-bit runs, which take longest
SMALL_RATE = 3e-5
FIT_TOKENS = 16_384  # of those trained on
RUNS = {
    **{
        f"{family}-{precision}": Recipe(family, precision, saved_steps=SAVED)
        for family in ("llama", "gpt2")
        for precision in ("fp", "binary", "ternary")
    },
    **{
        f"{family}-small-rate": Recipe(family, learning_rate=SMALL_RATE, saved_steps=SAVED)
        for family in ("llama", "gpt2")
    },
}


def steps_of(run: str) -> tuple[int, ...]:
    """The checkpoints of a run that are peeled."""
    return FEW_STEPS if RUNS[run].precision != "fp" else STEPS


def starts_of(run: str) -> tuple[str, ...]:
    """The starts that a run is peeled from."""
    return ("warm", "fresh") if run in ("llama-fp", "llama-binary", "llama-ternary") else ("warm",)


@dataclass(frozen=True)
class Row:
    """One checkpoint of one run, peeled from one start; losses in nats per token on the 10,000 test tokens."""

    step: int
    train_ce: float
    ce: float
    entropy: float
    control: float
    last: float
    yes: float
    yes_map: list[int]
    gap: float  # of the best map beyond the head control, and its interval
    low: float
    high: float
    beaten: int  # maps of a higher loss than the trained model's
    beaten_control: int  # …than that of its blocks under a refitted head
    zone: str | None
    unconverged: bool
    schemes: list[str]


def measure(run: str, cache: Path, work: Path, start: str) -> list[Row]:
    """Peel every checkpoint of a run that has been trained. In a child process."""
    import numpy as np
    import torch

    from peelcli.calibration import Calibration, Split
    from peelcli.checkpoint.files import open_checkpoint
    from peelcli.checkpoint.model import BlockwiseModel
    from peelcli.checkpoint.scan import scan
    from peelcli.config import FitConfig
    from peelcli.scoring.trained_pass import Extraction, extract, stored_states
    from peelcli.stages.describe import describe
    from peelcli.stages.fitter import FitTask, Fitter
    from peelcli.storage.activations import ActivationFile
    from peelcli.storage.fit_reader import read_fit
    from peelcli.verdict import Policy, judge

    recipe = RUNS[run]
    data = tokens(recipe, SHARED)
    rng = np.random.default_rng(0)

    def rows(ids: torch.Tensor, count: int | None = None) -> np.ndarray:
        whole = ids[: len(ids) // recipe.seq_len * recipe.seq_len].view(-1, recipe.seq_len).numpy()
        return whole if count is None else whole[np.sort(rng.permutation(len(whole))[:count])]

    split = Split(rows(data.train, FIT_TOKENS // recipe.seq_len), rows(data.select), rows(data.test))
    calibration = Calibration(
        split, recipe.seq_len, recipe.corpus, split.content_hash, data.vocab_size, False
    )
    found = []
    for step, directory in train(recipe, SHARED, cache).items():
        if step not in steps_of(run):
            continue
        place = work / f"{run}-{start}-{step}"
        place.mkdir(parents=True, exist_ok=True)
        model = BlockwiseModel(directory, dtype=torch.float32, device="cpu", offload_dir=place / "off")
        every = tuple(range(1, model.num_layers + 1))
        files = open_checkpoint(directory)
        about = describe(
            directory, model, calibration, scan=scan(files), layers=every, stored_bits=32.0, seed=0
        )
        stored = stored_states(model.num_layers, every)
        for _ in extract(model, calibration, Extraction(place / "acts.h5", about, {}, stored, "float32", 8)):
            pass
        acts = ActivationFile(place / "acts.h5")
        on_train = float(acts.nll[acts.rows["fit"]].mean())
        settings = FitConfig(references=("identity",), ladder=False, paths=("all",), start=start)
        for _ in Fitter(model, acts, FitTask(place / "fit.h5", settings, {})).run():
            pass
        acts.close()
        (place / "acts.h5").unlink()
        measured = read_fit(place / "fit.h5")
        network = judge(measured, Policy()).network
        bounds, paths = network.bounds, measured.paths
        assert bounds is not None
        assert bounds.last is not None
        assert paths is not None
        assert network.ce is not None
        assert network.entropy is not None
        beaten = sum(float(np.mean(s.nll_eval)) > bounds.control + 1e-4 for s in paths.scores)
        low, high = bounds.yes.gap_interval
        found.append(
            Row(
                step, on_train, network.ce, network.entropy, bounds.control, bounds.last.ce, bounds.yes.ce,
                list(bounds.yes.target_map), bounds.yes.gap, low, high, bounds.beaten, beaten, network.zone,
                "unconverged" in network.flags, list(paths.schemes),
            )
        )  # fmt: skip
        print(f"{run} {start} step {step}: zone {network.zone}", file=sys.stderr, flush=True)
    return found


def shown(rows: list[Row]) -> list[list[str]]:
    """The cells of a table."""
    return [
        [
            str(r.step), f"{r.train_ce:.3f}", f"{r.ce:.3f}", f"{r.control:.3f}", f"{r.last:.3f}", f"{r.yes:.3f}",
            "".join(map(str, r.yes_map)), f"{r.gap:+.4f} ({r.low:+.4f} to {r.high:+.4f})", f"{r.beaten}/8",
            f"{r.beaten_control}/8", f"{r.zone}{', unconverged' if r.unconverged else ''}",
        ]
        for r in rows
    ]  # fmt: skip


HEADER = (
    "step", "CE train", "CE test", "head control", "last", "YES", "map", "YES beyond the control", "maps above CE",
    "above control", "verdict",
)  # fmt: skip


def claims(found: dict[str, dict[str, list[Row]]]) -> list[str]:
    """The three claims against the figures, whatever they show."""
    lines = []
    for start in ("warm", "fresh"):
        ends = {run: rows[start][-1] for run, rows in found.items() if "small" not in run and start in rows}
        raw = ", ".join(f"{run} {r.beaten}/8" for run, r in ends.items())
        net = ", ".join(f"{run} {r.beaten_control}/8" for run, r in ends.items())
        wins = [
            f"{run} step {r.step} ({r.gap:+.4f}, map {''.join(map(str, r.yes_map))})"
            for run, rows in found.items()
            for r in rows.get(start, [])
            if r.low > 0.001
        ]
        lines += [
            f"(a) {start}: maps above the trained model's loss at the last step: {raw}; above the head control: {net}.",
            f"(b) {start}: a map beats the model beyond the head control at: {', '.join(wins) or 'no checkpoint'}.",
        ]
    for run in (f"{family}-{rate}" for family in ("llama", "gpt2") for rate in ("small-rate", "fp")):
        if run in found:
            rows = found[run]["warm"]
            said = (f"{r.step}: {r.zone}{' unconverged' if r.unconverged else ''}" for r in rows)
            lines.append(f"(c) {run}, by step: {', '.join(said)}.")
    return lines


def main() -> None:
    """Train what is not in the cache, measure, print, and keep the figures where asked."""
    options = parser(__doc__)
    options.add_argument("--cache", type=Path, required=True, help="where checkpoints and files are kept")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    options.add_argument("--child", nargs=2, metavar=("RUN", "START"))
    args = options.parse_args()
    if args.child:
        run, start = args.child
        rows = measure(run, args.cache / "decoders", args.cache / "work", start)
        json.dump([asdict(row) for row in rows], sys.stdout)
        return
    found: dict[str, dict[str, list[Row]]] = {}
    for run in args.only:
        for start in starts_of(run):
            kept = args.cache / f"{run}-{start}.json"
            if not kept.exists():
                child = [__file__, "--cache", str(args.cache), "--child", run, start]
                kept.write_text(run_child(child, threads=args.threads).stdout, encoding="utf-8")
            found.setdefault(run, {})[start] = [
                Row(**row)
                for row in json.loads(kept.read_text(encoding="utf-8"))
                if row["step"] in steps_of(run)
            ]
    parts = [
        f"4 layers, width 96, 100,000 characters of Shakespeare trained on (800 steps of 16 x 128), {FIT_TOKENS:,} of "
        "them to fit the maps, 10,000 held out to choose by and 10,000 for the figures. CE in nats per character.",
        *claims(found),
    ]
    for run, starts in found.items():
        for start, rows in starts.items():
            scheme = "/".join(dict.fromkeys(rows[-1].schemes))
            parts.append(f"### {run}, blocks {scheme}, {start} start\n\n{table(HEADER, shown(rows))}")
    publish("paper_claims", "\n\n".join(parts), write=args.write)


if __name__ == "__main__":
    main()
