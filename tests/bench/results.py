"""What the benchmarks share: one measured child process, and the file that keeps the last figures.

A benchmark never imports torch or peel into its own process: a child's peak memory would begin at its parent's.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "data" / "stories260K-hf"
RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = """# Figures

What the scripts beside this file measured last; `python tests/bench/NAME.py --write` renews a section.
"""
LIBRARIES = ("torch", "transformers", "accelerate", "h5py")
_BYTES_A_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True)
class Measured:
    """A child process that has ended: seconds, bytes, and its stderr line by line with the time of each."""

    stdout: str
    stderr: tuple[tuple[float, str], ...]
    returncode: int
    wall: float
    cpu: float
    peak: int


def run_child(
    args: Sequence[str], *, threads: int, env: Mapping[str, str] | None = None, allowed: Sequence[int] = (0,)
) -> Measured:
    """Run `python ARGS` on this checkout; ends the benchmark where the exit code is not `allowed`."""
    full = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }
    full |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **(env or {})}
    full["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=full, text=True
    )
    assert child.stdout is not None
    assert child.stderr is not None
    # Each child writes one short line to stdout (or its report, at the end), so that the pipe cannot fill meanwhile.
    stderr = tuple((time.perf_counter() - began, line.rstrip("\n")) for line in child.stderr)
    stdout = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in allowed:
        shown = "\n".join(line for _, line in stderr[-20:])
        raise SystemExit(f"python {' '.join(args)}: ended with {child.returncode}\n{shown}")
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _BYTES_A_UNIT
    return Measured(stdout, stderr, child.returncode, wall, cpu, peak)


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--write", action="store_true", help="keep the figures in RESULTS.md")
    return options


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with its columns aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def machine() -> str:
    """This machine and the versions of what runs on it, in words."""
    model, memory = platform.processor() or platform.machine(), 0.0
    if sys.platform == "linux":
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        )
        model = found[1] if found else model
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        f"{datetime.date.today().isoformat()}; {os.cpu_count()} processors ({model}), {memory:.0f} GiB of memory, "
        f"load {load} at the end; Python {platform.python_version()}, {versions}"
    )


def publish(name: str, text: str, *, write: bool) -> None:
    """Print the figures of benchmark `name`; with `write`, put them in its section of RESULTS.md."""
    body = f"{text.strip()}\n\n{machine()}.\n"
    print(body, end="")
    if not write:
        return
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else TITLE
    head, *parts = re.split(r"^## ", old, flags=re.MULTILINE)
    sections = {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}
    sections[name] = body.strip()
    kept = "".join(f"\n## {key}\n\n{sections[key]}\n" for key in sorted(sections))
    RESULTS.write_text(head.rstrip() + "\n" + kept, encoding="utf-8")
