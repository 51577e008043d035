"""SIGTERM and SIGHUP end a command as Ctrl-C does: what was done is said to be kept, and is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import EXTRACT, Blow, leftovers, peel, peel_apart, save_ids, save_tiny

ROOT = Path(__file__).parents[2]
KEPT = "what was done is kept, and the same command goes on from there"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SAYS = {
    signal.SIGINT: f"error: interrupted; {KEPT}",
    signal.SIGTERM: f"error: interrupted by SIGTERM; {KEPT}",
    signal.SIGHUP: f"error: interrupted by SIGHUP; {KEPT}",
}


@pytest.fixture(autouse=True)
def hangups_arrive() -> Iterator[None]:
    """Under nohup the tests themselves ignore SIGHUP, and so would every process that they start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    save_tiny(base / "ckpt")
    save_ids(base / "ids.npy")
    return base


STRUCK = [("scan", signal.SIGTERM), ("open", signal.SIGHUP), ("extract 2/5", signal.SIGTERM)]


@pytest.mark.parametrize(("line", "number"), STRUCK)
def test_a_signal_keeps_what_was_done_and_says_so(
    line: str, number: signal.Signals, base: Path, tmp_path: Path
) -> None:
    command = ("extract", base / "ckpt", "--data", base / "ids.npy", *EXTRACT)
    struck = peel_apart(tmp_path, *command, blow=Blow(line, number))
    assert (struck.code, struck.out) == (CODES[number], "")
    assert struck.err.splitlines()[-1] == SAYS[number]
    assert "Traceback" not in struck.err
    by_hand = peel_apart(tmp_path / "by-hand", *command, blow=Blow(line, signal.SIGINT))
    assert leftovers(tmp_path / "peel") == leftovers(tmp_path / "by-hand" / "peel")
    assert by_hand.code == 130
    assert peel(tmp_path, *command).code == 0


def test_the_codes_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith("| 130")]
    for number, code in CODES.items():
        assert str(code) in row
        assert number.name in row or number == signal.SIGINT


# -- a toy command, struck where it stands -----------------------------------------------------------------------------

TOY = """
import ctypes, os, signal, sys, threading, time
from peelcli.cli import main, signals
from peelcli.cli.console import Console
from peelcli.cli.options import with_options
from peelcli.records.progress import Progress

def ready():
    open(os.environ["READY"], "w").close()

def asleep(console):
    ready()
    time.sleep(30)

def failing(console):
    console.error = lambda *lines: (ready(), time.sleep(2), print(*lines, file=console.stderr, flush=True))
    raise KeyError("a mistake")

def in_c_code(console):
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.ENDING)  # in the main thread alone, which now hears nothing
    ready()
    ctypes.CDLL(None).sleep(30)

def lost(console):
    class Forgetful:
        def __del__(self):
            ready()
            time.sleep(2)
    forgotten = Forgetful()
    del forgotten  # an exception in __del__ goes nowhere
    def steps():
        for done in range(1, 100):
            time.sleep(0.1)
            yield Progress("fit", done, 100)
    console.drive(steps())

def turned(console):
    try:
        ready()
        time.sleep(30)
    except BaseException as error:
        raise SystemError("initialization failed") from error

def cleaning(console):
    try:
        ready()
        time.sleep(30)
    finally:
        time.sleep(30)

def writing(console):
    threading.Timer(0.5, ready).start()
    console.result("x" * 10_000_000)

@with_options()
def toy(console: Console) -> int:
    console.hush_libraries()
    globals()[os.environ["KIND"]](console)
    return 0

main.run.__defaults__ = (main.build_app({"toy": toy}),)
sys.argv = ["peel", "toy"]
main.main()
"""


def started(kind: str, tmp_path: Path, wrap: tuple[str, ...] = (), code: str = TOY) -> subprocess.Popen[str]:
    """The toy command in a process of its own, once it stands where `kind` says."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PEEL_", "PYTHON"))}
    process = subprocess.Popen(
        [*wrap, sys.executable, "-c", code],
        env=env | {"PYTHONPATH": str(ROOT), "KIND": kind, "READY": str(tmp_path / "ready")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("kind", ["asleep", "lost", "turned"])
def test_a_signal_ends_it_whatever_becomes_of_its_exception(
    kind: str, number: signal.Signals, tmp_path: Path
) -> None:
    process = started(kind, tmp_path)
    process.send_signal(number)
    code, out, err = ended(process)
    assert (code, out, err.splitlines()[-1]) == (CODES[number], "", SAYS[number])
    assert "Traceback" not in err


def test_a_signal_while_a_failure_is_told_adds_no_traceback(tmp_path: Path) -> None:
    process = started("failing", tmp_path)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 3
    assert len(err.splitlines()) == 1
    assert "KeyError" in err


@pytest.mark.parametrize("kind", ["in_c_code", "cleaning"])
@pytest.mark.parametrize("number", CODES)
def test_a_second_signal_ends_it_at_once(kind: str, number: signal.Signals, tmp_path: Path) -> None:
    process = started(kind, tmp_path)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(number)
    code, out, err = ended(process)
    assert (code, out) == (CODES[number], "")
    assert "ended at once by a second signal" in err
    assert "Traceback" not in err


def test_a_signal_sent_twice_in_one_go_is_one_request(tmp_path: Path) -> None:
    """As `timeout` sends it, to the process and to its group, and a closed terminal with its shell."""
    process = started("cleaning", tmp_path)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    time.sleep(1)
    assert process.poll() is None
    process.kill()
    ended(process)


def test_a_result_that_is_being_written_is_written_whole(tmp_path: Path) -> None:
    process = started("writing", tmp_path)  # the pipe is full by now, and nobody reads it
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    code, out, err = ended(process)
    assert len(out) == 10_000_001
    assert (code, err.splitlines()[-1]) == (143, SAYS[signal.SIGTERM])


def test_what_was_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    process = started("asleep", tmp_path, wrap=("bash", "-c", 'trap "" HUP; exec "$@"', "bash"))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


IMPORTING = """
import os, sys, time
class Slow:
    def find_spec(self, name, *_):
        if name == "typer":
            open(os.environ["READY"], "w").close()
            time.sleep(1)
sys.meta_path.insert(0, Slow())
sys.argv = ["peel", "--version"]
from peelcli.__main__ import main
main()
"""


@pytest.mark.parametrize("number", CODES)
def test_a_signal_during_the_first_imports_prints_no_traceback(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = started("", tmp_path, code=IMPORTING)
    process.send_signal(number)
    assert ended(process) == (CODES[number], "", SAYS[number] + "\n")
