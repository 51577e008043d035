"""How often a night like the one before is said to have regressed, and how often a night with a fault is.

    python tests/bench/nights.py --cache DIR [--write]

Small decoders in full precision, two of Llama's kind and one of GPT-2's, audited at six nights of their run, 200 steps
apart while the learning rate falls; each night is held against the one before and against the first as a baseline, in
the text that they were trained on. Then the same night once more with one layer changed: as it was the night before,
newly initialised, or moved only a tenth of the way that it has gone since the night before.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from decoders import Recipe, train
from results import parser, publish, table

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
NIGHTS = (200, 400, 600, 800, 1000, 1200)
RECIPES = [
    Recipe(
        family, steps=1200, saved_steps=NIGHTS, seed=seed, num_layers=5, d_model=64, seq_len=64, batch_size=8
    )
    for family, seed in (("llama", 0), ("llama", 1), ("gpt2", 0))
]
FAULTS = ("as the night before", "newly initialised", "a tenth of the way")


def blocks(model: object) -> object:
    """The decoder blocks of either family."""
    body = getattr(model, "model", None) or model.transformer  # type: ignore[attr-defined]
    return getattr(body, "layers", None) or body.h


def plant(before: Path, night: Path, layer: int, fault: str, target: Path) -> Path:
    """A copy of `night` with one layer changed."""
    import torch
    import transformers

    shutil.copytree(night, target)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, older = load(night, dtype=torch.float32), load(before, dtype=torch.float32)
    torch.manual_seed(7)
    fresh = transformers.AutoModelForCausalLM.from_config(model.config)
    other = blocks(fresh if fault == "newly initialised" else older)[layer - 1]  # type: ignore[index]
    share = 0.9 if fault == "a tenth of the way" else 1.0
    for mine, its in zip(blocks(model)[layer - 1].parameters(), other.parameters(), strict=True):  # type: ignore[index]
        mine.data.lerp_(its.data, share) if share < 1 else mine.data.copy_(its.data)
    model.save_pretrained(target)
    return target


def audit(checkpoint: Path, work: Path) -> object:
    """The run of one checkpoint, dropped and ternary blocks only."""
    from peelcli.config import ExtractConfig, FitConfig
    from peelcli.stages.audit import run_audit
    from peelcli.stages.workspace import Workspace

    text = SHARED / "tinyshakespeare.txt"
    extract = ExtractConfig(
        data=(text,), fit_tokens=4096, select_tokens=4096, eval_tokens=8192, seq_len=64, threads=1
    )
    fit = FitConfig(
        references=("identity", "direct"), direct_steps=10, ladder=False, paths=("none",), threads=1
    )
    steps = run_audit(checkpoint, extract, fit, Workspace(work / checkpoint.name, checkpoint))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value.run


def regressed(*runs: object) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The layers of the last run that got worse since the first, and the network's new flags."""
    from peelcli.verdict import Policy, judge, note_identical, with_comparisons

    policy = Policy(fail_on=("regressed",))
    judged = [judge(run, policy) for run in note_identical([runs[0], runs[-1]])]  # type: ignore[list-item]
    comparison = with_comparisons(judged, policy)[-1].comparison
    assert comparison is not None
    for change in comparison.layers:
        if change.status == "regressed":
            print(f"    layer {change.layer}: {change.reason}", file=sys.stderr)
    return comparison.regressed, comparison.new_flags


def measured(cache: Path) -> Iterator[tuple[str, str, bool, bool]]:
    """Recipe, what was done to the night, whether a layer that is sound was named, and whether the faulty one was."""
    for recipe in RECIPES:
        name = f"{recipe.family} {recipe.seed}"
        found = train(recipe, SHARED, cache)
        runs = {step: audit(path, cache / "work" / recipe.digest) for step, path in found.items()}
        for before, night in zip(NIGHTS, NIGHTS[1:], strict=False):
            print(f"{name}: {before} to {night}", file=sys.stderr)
            layers, flags = regressed(runs[before], runs[night])
            yield name, "nothing, since the night before", bool(layers or flags), False
            layers, flags = regressed(runs[NIGHTS[0]], runs[night])
            yield name, "nothing, since the first night", bool(layers or flags), False
        for number, fault in enumerate(FAULTS):
            for layer in range(1, recipe.num_layers + 1):
                before, night = NIGHTS[2 + number % 2], NIGHTS[3 + number % 2]
                planted = cache / "planted" / f"{recipe.digest}-{fault.replace(' ', '-')}-{layer}"
                if not planted.exists():
                    plant(found[before], found[night], layer, fault, planted)
                print(f"{name}: {fault}, layer {layer}", file=sys.stderr)
                layers, _ = regressed(runs[before], audit(planted, cache / "work" / "planted"))
                yield name, fault, bool(set(layers) - {layer}), layer in layers


def main() -> None:
    """Train, audit, compare, count."""
    options = parser(__doc__)
    options.add_argument("--cache", type=Path, required=True)
    chosen = options.parse_args()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rows = list(measured(chosen.cache))
    counted = []
    for done in dict.fromkeys(row[1] for row in rows):
        those = [row for row in rows if row[1] == done]
        named = "-" if done.startswith("nothing") else f"{sum(r[3] for r in those)} of {len(those)}"
        counted.append((done, f"{sum(r[2] for r in those)} of {len(those)}", named))
    header = ("what was done to one layer", "another layer or the network named", "the faulty layer named")
    text = "`--fail-on regressed` on nights of small decoders (5 layers; two of Llama's kind, one of GPT-2's)\n\n"
    publish("nights", text + table(header, counted), write=chosen.write)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
