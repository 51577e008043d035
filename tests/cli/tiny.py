"""A tiny checkpoint, and the command line run on it: in this process, or in one of its own that a signal may end."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build_model

SEQ_LEN = 32
ONE_THREAD = (
    "--threads",
    "1",
)  # tests share their machine, and threads that wait for each other slow it down
TOKENS = ("--fit-tokens", "512", "--select-tokens", "256", "--eval-tokens", "512", "--seq-len", str(SEQ_LEN))
FEW = ("--direct-steps", "2", "--challenge-steps", "2", "--path-steps", "1", "--head-steps", "4")
STEPS = (*FEW, "--no-ladder")
EXTRACT, FIT, AUDIT = (*TOKENS, *ONE_THREAD), (*STEPS, *ONE_THREAD), (*TOKENS, *STEPS, *ONE_THREAD)
NARROW: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "head_dim": 4, "intermediate_size": 24},
    "gpt2": {"n_embd": 16},
}


def save_tiny(directory: Path, family: str = "llama", shard: str = "5GB", **overrides: Any) -> Path:
    """A random model of three layers and 97 tokens, saved without a tokenizer."""
    model: Any = build_model(family, **NARROW[family], **overrides)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def save_ids(path: Path, rows: int = 40, vocab_size: int = 97) -> Path:
    """Random token ids, one training sequence a row."""
    np.save(path, np.random.default_rng(0).integers(0, vocab_size, size=(rows, SEQ_LEN)))
    return path


@dataclass(frozen=True)
class Done:
    """How one command ended."""

    code: int | None
    out: str
    err: str

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The runs of a JSON report, without what the clock says."""
        runs: list[dict[str, Any]] = json.loads(self.out)["runs"]
        for run in runs:
            run.pop("timing")
        return runs

    @property
    def stages(self) -> set[str]:
        """The stages that did something, by the first word of their lines of progress."""
        return {line.split()[0] for line in self.err.splitlines() if line and "/" in line.split(" ", 2)[1]}


@contextlib.contextmanager
def at_home(home: Path) -> Iterator[None]:
    """No settings from outside, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("PEEL_")]:
            patch.delenv(name)
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield


def peel(home: Path, *arguments: object) -> Done:
    """Run one command in this process, with its cache in `home`."""
    from peelcli.cli.main import run

    out, err = io.StringIO(), io.StringIO()
    with at_home(home), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(a) for a in arguments])
    return Done(code, out.getvalue(), err.getvalue())


def leftovers(*directories: Path) -> list[str]:
    """What a failed command must not leave: files under a temporary name, and results under a final one."""
    files = [path for directory in directories for path in directory.rglob("*") if path.is_file()]
    parts = [
        p for p in files if p.parent.name.endswith(".parts")
    ]  # whole layers, which the next run goes on from
    results = [p for p in files if p.suffix in (".h5", ".safetensors") and p not in parts]
    return sorted(p.name for p in files if ".partial" in p.name or p in results)


# -- in a process of its own -------------------------------------------------------------------------------------------

# Processes are forked from one that has imported torch already, and has not yet computed anything.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["peelcli.stages.audit", "transformers.models.llama.modeling_llama"])


@dataclass(frozen=True)
class Blow:
    """A signal that reaches the process `delay` seconds after the line of progress that starts with `line`."""

    line: str
    number: int
    delay: float = 0.0


class _Struck(io.TextIOWrapper):
    blow: Blow | None = None

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.blow is not None and text.startswith(self.blow.line):
            whom = (os.getpid(), self.blow.number)
            if self.blow.delay:
                strike = threading.Timer(self.blow.delay, os.kill, whom)
                strike.daemon = True
                strike.start()
            else:
                os.kill(*whom)
        return written


def _child(
    home: Path, arguments: list[str], largest_file: int | None, blow: Blow | None, closed_pipe: bool
) -> None:
    from peelcli.cli import console
    from peelcli.cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["XDG_CACHE_HOME"] = str(home)
    # Opened by number, so that what C libraries print is seen too.
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(home / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    if closed_pipe:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # open for as long as the process lives
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if blow is not None:
        # On a descriptor of its own, which the console keeps: it takes 1 and 2 from the libraries.
        sys.stderr = struck = _Struck(open(os.dup(2), "wb"), line_buffering=True)  # noqa: SIM115
        console.EVERY_SECONDS, struck.blow = (
            0.0,
            blow,
        )  # a line a step, so that the blow falls where it is meant to
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["peel", *arguments]
    main()


def peel_apart(
    home: Path,
    *arguments: object,
    largest_file: int | None = None,
    blow: Blow | None = None,
    closed_pipe: bool = False,
) -> Done:
    """Run one command in a process of its own; a signal that ended it is a negative exit code."""
    home.mkdir(exist_ok=True)
    with at_home(home):
        plain = [str(a) for a in arguments]
        process = _PROCESSES.Process(target=_child, args=(home, plain, largest_file, blow, closed_pipe))
        process.start()
        process.join(120)
    return Done(process.exitcode, (home / "out").read_text(), (home / "err").read_text())
