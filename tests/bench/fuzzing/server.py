"""Runs peel's command line in forked children of one process that has imported everything, under limits.

The parent computes nothing itself: a child that is forked from a process with threads may wait for them for ever.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MEMORY = 2 * 2**30  # bytes that a command may hold at most
SECONDS = 30.0  # of a processor, that a command may take at most
WALL = 4 * SECONDS  # a busy machine gives a process less than a processor
ROOM = 4 * 2**30  # bytes of addresses above the parent's: what asks for more is told that there is no memory
_UNKNOWN = 97


@dataclass(frozen=True)
class Ended:
    """How one command ended. `code` is negative where a signal ended it."""

    code: int
    out: bytes
    err: bytes
    peak: int  # bytes
    seconds: float  # of a processor
    in_time: bool


def import_everything() -> None:
    """Import what commands import, once, so that a child starts in milliseconds."""
    import accelerate  # noqa: F401
    import h5py  # noqa: F401
    import torch
    import transformers
    import yaml  # noqa: F401

    import peelcli

    torch.set_num_threads(1)
    for name in ("LlamaForCausalLM", "AutoModelForCausalLM", "AutoTokenizer", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    for module in pkgutil.walk_packages(peelcli.__path__, "peelcli."):
        if not any(part in module.name for part in ("triton", "callbacks", "loggers", "__main__")):
            importlib.import_module(module.name)


def run(arguments: Sequence[str], home: Path, *, unlimited: bool = False) -> Ended:
    """The end of `peel ARGUMENTS` in a child, with its cache in `home`."""

    def command() -> None:
        from peelcli.cli.main import main

        sys.argv = ["peel", *arguments]
        main()

    return run_apart(command, home, unlimited=unlimited)


def run_apart(function: Callable[[], None], home: Path, *, unlimited: bool = False) -> Ended:
    """The end of `function` in a child."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _be_child(function, home, out.fileno(), err.fileno(), unlimited)
        in_time, status, usage = _wait(child)
        out.seek(0)
        err.seek(0)
        return Ended(
            os.waitstatus_to_exitcode(status),
            out.read(),
            err.read(),
            usage.ru_maxrss * 1024,
            usage.ru_utime + usage.ru_stime,
            in_time,
        )


def _wait(child: int) -> tuple[bool, int, resource.struct_rusage]:
    deadline = time.monotonic() + WALL
    while time.monotonic() < deadline:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return usage.ru_utime + usage.ru_stime <= SECONDS, status, usage
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return False, status, usage


def _be_child(function: Callable[[], None], home: Path, out: int, err: int, unlimited: bool) -> None:
    """Run `function` and end the process; never returns."""
    code = _UNKNOWN
    try:
        os.setsid()
        for source, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(source, number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        for name in [name for name in os.environ if name.startswith("PEEL_")]:
            del os.environ[name]
        os.environ["XDG_CACHE_HOME"] = str(home)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not unlimited:
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))
            resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS), int(SECONDS) + 1))
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:  # noqa: BLE001  # it must not unwind into the parent's frames
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
