"""What PeelCallback costs the training that it stands beside.

    python tests/bench/callback_cost.py [--runs 3] [--steps 150] [--write]

A real Trainer run of a small Llama with two threads, which saves four checkpoints, with the callback and without it, in
turns and each in a process of its own. Counted are the Trainer's own runtime, which ends before the audits are waited
for, and the processor time of the training process, which others on the machine disturb less. Goal: within 5%.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from results import parser, publish, run_child, table

CHILD = """
import json, sys, time, warnings
from pathlib import Path
import torch, transformers
sys.path.insert(0, {bench!r})
from models import save_llama, save_tokens
out, steps, with_peel = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "with"
transformers.utils.logging.disable_progress_bar()
save_llama(out / "begin", 4, width=128)
save_tokens(out / "ids.npy", 40_960)
torch.set_num_threads(2)
model = transformers.AutoModelForCausalLM.from_pretrained(out / "begin", dtype=torch.float32)
ids = torch.randint(0, 1000, (256, 128), generator=torch.Generator().manual_seed(0)).tolist()
arguments = transformers.TrainingArguments(str(out / "run"), max_steps=steps, save_steps=steps // 4, logging_steps=10,
    per_device_train_batch_size=8, report_to="none", disable_tqdm=True, use_cpu=True)
callbacks = []
if with_peel:
    from peelcli.callbacks import PeelCallback
    callbacks = [PeelCallback(data=str(out / "ids.npy"), seq_len=128, references=["identity"], paths="none", wait=0.0)]
marks = {{}}
class Clock(transformers.TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        marks["began"] = time.process_time()
    def on_train_end(self, *args, **kwargs):
        marks["ended"] = time.process_time()
trainer = transformers.Trainer(model, arguments, train_dataset=[{{"input_ids": r, "labels": r}} for r in ids],
    callbacks=[Clock(), *callbacks], data_collator=transformers.default_data_collator)
warnings.simplefilter("ignore")
result = trainer.train()
print("RESULT", json.dumps([result.metrics["train_runtime"], marks["ended"] - marks["began"],
    [o.code for c in callbacks for o in c.outcomes]]))
"""


def measured(steps: int, which: str) -> tuple[float, float, list[int | None]]:
    """Seconds of the training by the wall clock and of its process, and how the audits came out."""
    with tempfile.TemporaryDirectory() as out:
        code = CHILD.format(bench=str(Path(__file__).parent))
        done = run_child(["-c", code, out, str(steps), which], threads=2)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    wall, cpu, codes = json.loads(line.removeprefix("RESULT"))
    return wall, cpu, codes


def main() -> None:
    """Train in turns, compare the medians."""
    options = parser(__doc__)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--steps", type=int, default=150)
    chosen = options.parse_args()
    found: dict[str, list[tuple[float, float, list[int | None]]]] = {"without": [], "with": []}
    for number in range(chosen.runs):
        for which in found if number % 2 == 0 else reversed(found):
            found[which].append(measured(chosen.steps, which))
            print(which, found[which][-1], file=sys.stderr)
    rows, medians = [], {}
    for which, those in found.items():
        walls, cpus = [one[0] for one in those], [one[1] for one in those]
        medians[which] = (median(walls), median(cpus))
        rows.append([which, *(f"{median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in (walls, cpus))])
    wall, cpu = (medians["with"][i] / medians["without"][i] - 1 for i in (0, 1))
    finished = sum(code in (0, 1) for one in found["with"] for code in one[2])
    text = (
        f"A Trainer run of {chosen.steps} steps with 4 checkpoints, {chosen.runs} times each way, in turns; median "
        "(least to most).\n\n"
        + table(("callback", "training, s by the wall clock", "training process, s of processor time"), rows)
        + f"\n\nWith the callback {wall:+.1%} by the wall clock and {cpu:+.1%} of processor time; {finished} audits "
        "ended while the training ran. The machine was shared (its load stands below), so that the wall clock tells of "
        "others, too.\n\n"
        f"Goal (processor time within 5%): {'met' if cpu <= 0.05 else 'not met'}."
    )
    publish("callback_cost", text, write=chosen.write)


if __name__ == "__main__":
    main()
