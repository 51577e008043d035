"""Are the verdicts right? Faults planted in small trained decoders, the truth about them, and who finds them.

    python tests/bench/planted_faults.py --cache DIR [--split NAME] [--bases NAME …] [--workers 2] [--models-only] …

Two or three decoders a split, Llama-, GPT-2- and BitNet-style, full precision, ternary and binary: healthy, early,
audited on foreign text, and with one layer hurt in training or afterwards. The truth is measured, not taken from the
plant's name (planted/truth.py). Models, truths and audits are kept under --cache; what is there is not done again.
Peers are needed here alone: weightwatcher, and llmcompressor for GPTQ's error, which is left out where it is not
installed (it wants an older transformers: an environment of its own and --models-only add it to the cache).
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from planted.cases import BASES, SPLITS, Case, cases_of
from results import parser, publish, run_child

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def measure(case: Case, cache: Path, *, audit: bool) -> None:
    """Train, plant, measure the truth, ask the peers, audit: whatever the cache lacks of one case. Runs in a child."""
    import torch
    import transformers
    from planted.detect import audited, detected
    from planted.truth import truths_of

    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # of what transformers compiles for BitNet, for large matrices
    transformers.utils.logging.disable_progress_bar()
    kept = cache / "cases" / f"{case.name}.json"
    record = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if "truths" not in record:
        record["truths"] = [asdict(truth) for truth in truths_of(case, SHARED, cache)]
    record.setdefault("peers", {})
    record["peers"] |= detected(case, SHARED, cache, tuple(record["peers"]))
    if audit:
        began = time.process_time()
        fit = audited(case, SHARED, cache)
        if record.get("fit") != str(fit):
            record["fit"], record["audit_seconds"] = str(fit), time.process_time() - began
    partial = kept.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(kept)


def main() -> None:
    """Measure what the cache lacks, print the figures, and keep them where asked."""
    options = parser(__doc__)
    options.add_argument("--cache", type=Path, required=True, help="where models, truths and audits are kept")
    options.add_argument("--split", choices=(*SPLITS, "all"), default="all")
    options.add_argument("--bases", nargs="*", choices=list(BASES), default=list(BASES))
    options.add_argument("--workers", type=int, default=2, help="bases that are worked on at once")
    options.add_argument("--models-only", action="store_true", help="fill the cache, and audit nothing")
    options.add_argument("--child", metavar="BASE")
    args = options.parse_args()
    if args.child:
        for case in cases_of(BASES[args.child]):
            began = time.monotonic()
            measure(case, args.cache, audit=not args.models_only)
            print(f"{case.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return
    splits = SPLITS if args.split == "all" else (args.split,)
    bases = [base for base in BASES.values() if base.split in splits and base.name in args.bases]
    passed = ["--cache", str(args.cache), *(["--models-only"] if args.models_only else [])]
    children = [[__file__, *passed, "--child", base.name] for base in bases]
    with ThreadPoolExecutor(args.workers) as pool:
        for _ in pool.map(lambda child: run_child(child, threads=1), children):
            pass
    if args.models_only:
        return
    from planted.figures import report

    publish("planted_faults", report(bases, args.cache), write=args.write)


if __name__ == "__main__":
    main()
