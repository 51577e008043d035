"""Does damaged input ever end in anything but a message? Damages files of every kind, and runs the commands on them.

python tests/bench/fuzz.py [--inputs 2000] [--seed 0] [--only TARGET[:NUMBER]] [--keep DIR] [--write]

Every case is made anew from the seed, its target and its number. Goal: of 2,000 inputs no internal error, no signal,
nothing above 2 GB or 30 s, nothing on a terminal that a file put there, stdout whole or empty.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fuzzing import server
from fuzzing.targets import Target, all_targets, check_ground, make_ground, words_of
from results import ROOT, parser, publish, table

FAULTS = (
    "internal error", "traceback", "signal", "above 2 GB", "above 30 s", "exit code", "no words", "stdout", "terminal",
)  # fmt: skip
_NO_MEMORY = "out of memory"
CONTROLLED = 200  # from so many inputs on the sound files are run too


@dataclass(frozen=True)
class Case:
    """One damaged input, and how the command over it ended."""

    target: Target
    number: int
    mutation: str
    command: str
    ended: server.Ended

    @property
    def faults(self) -> set[str]:
        """What is wrong with how it ended, by the names in FAULTS."""
        ended, err = self.ended, self.ended.err.decode("utf-8", "replace")
        refused = ended.code not in (0, 1)
        found = {
            "internal error": "mistake in peel" in err,
            "traceback": "Traceback (most recent" in err,
            "signal": ended.code < 0 and ended.in_time,
            "above 2 GB": ended.peak > server.MEMORY or _NO_MEMORY in err,
            "above 30 s": not ended.in_time,
            "exit code": ended.code >= 0 and ended.code not in (0, 1, 2, 3),
            "no words": refused and ended.code > 0 and "error: " not in err,
            "stdout": (refused and ended.out != b"") or (not refused and not _whole(self.command, ended.out)),
            "terminal": not (_harmless(err) and _harmless(ended.out.decode("utf-8", "replace"))),
        }
        return {name for name, is_so in found.items() if is_so}


def _whole(command: str, out: bytes) -> bool:
    """Whether a result is a result: some text that ends, and JSON where JSON was asked for."""
    if not out.endswith(b"\n"):
        return command.startswith("{arguments")
    if "-f json" not in command or "--dry-run" in command:
        return True
    try:
        json.loads(out)
    except ValueError:
        return False
    return True


def _harmless(text: str) -> bool:
    """Whether a terminal and a CI runner would show a text and do nothing else."""
    visible = all(char.isprintable() or char == "\n" for char in text)
    return visible and not re.search(r"^\s*::|##\w*\[", text, re.MULTILINE)


def run_case(target: Target, number: int, seed: int, ground: Path, place: Path) -> Case:
    """Damage the file of `target` as its number says, in `place`, and run a command over it."""
    rng = random.Random(f"{seed} {target.file} {number}")
    place.mkdir(parents=True)
    if "/" in target.file:
        shutil.copytree(ground / target.top, place / target.top)
        (place / target.file).unlink()
    mutation = rng.choice(list(target.mutators))
    target.mutators[mutation](rng, ground / target.file, place / target.file)
    command = rng.choice(target.commands)
    os.chdir(place)
    ended = server.run(words_of(command, ground, place), place / "home")
    return Case(target, number, mutation, command, ended)


def run_cases(wanted: list[tuple[Target, int]], seed: int, keep: Path | None) -> list[Case]:
    """Run the cases by target and number; says which have a fault, and leaves their files in `keep`."""
    cases = []
    with tempfile.TemporaryDirectory(prefix="peel-fuzz-") as base:
        ground, place = Path(base) / "ground", Path(base) / "case"
        ground.mkdir()
        make_ground(ground)
        if len(wanted) >= CONTROLLED:
            check_ground(ground)
        for target, number in wanted:
            case = run_case(target, number, seed, ground, place)
            cases.append(case)
            if case.faults:
                _tell(case)
                if keep is not None:
                    shutil.move(place, keep / f"{target.file.replace('/', '-')}-{number}")
            os.chdir(base)
            shutil.rmtree(place, ignore_errors=True)
        os.chdir(ROOT)
    return cases


def summary(cases: list[Case]) -> str:
    """A table with a row for each target: how many inputs, how they ended, and their faults."""
    rows = []
    for target in dict.fromkeys(case.target.file for case in cases):
        own = [case for case in cases if case.target.file == target]
        codes = Counter(case.ended.code for case in own)
        ends = " · ".join(f"{code}: {count}" for code, count in sorted(codes.items()))
        peak = max(case.ended.peak for case in own) / 2**20
        seconds = max(case.ended.seconds for case in own)
        faulty = sum(bool(case.faults) for case in own)
        rows.append((target, len(own), ends, f"{peak:.0f}", f"{seconds:.1f}", faulty))
    found = Counter(fault for case in cases for fault in case.faults)
    faults = ", ".join(f"{name}: {found[name]}" for name in FAULTS)
    head = ("damaged", "inputs", "exit code: inputs", "peak MiB", "longest s", "faulty")
    return f"{table(head, rows)}\n\n{len(cases)} inputs; {faults}."


def main() -> None:
    """Run the cases asked for; the exit code is 1 where one has a fault."""
    options = parser(__doc__)
    options.add_argument("--inputs", type=int, default=2000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", metavar="TARGET[:NUMBER]", help="the cases of one target, or one of them")
    options.add_argument("--keep", type=Path, help="leave the files of faulty cases in this directory")
    args = options.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    server.import_everything()
    name, _, number = (args.only or "").partition(":")
    chosen = [target for target in all_targets() if name in ("", target.file)]
    wanted = [(chosen[i % len(chosen)], i // len(chosen)) for i in range(args.inputs)]
    if number:
        wanted = [(chosen[0], int(number))]
    cases = run_cases(wanted, args.seed, args.keep)
    publish("fuzz", summary(cases), write=args.write)
    sys.exit(any(case.faults for case in cases))


def _tell(case: Case) -> None:
    last = case.ended.err.decode("utf-8", "replace").strip().splitlines()[-1:] or [""]
    what = f"{case.target.file}:{case.number} ({case.mutation}; {case.command.split()[0]})"
    print(f"{what}: {', '.join(sorted(case.faults))}: {case.ended.code}: {ascii(last[0][:500])}", flush=True)


if __name__ == "__main__":
    main()
