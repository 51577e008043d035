"""What a script sees: stdout whole or empty, plain lines off a terminal, an exit code for each end."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peelcli import __version__, errors
from peelcli.cli.console import Console
from peelcli.cli.main import build_app, run
from peelcli.cli.options import with_options
from peelcli.config import ConsoleConfig, FitConfig
from peelcli.records.printable import is_visible, printable
from peelcli.records.progress import Progress

ROOT = Path(__file__).parents[2]
COLOUR = re.compile(r"\x1b\[[0-9;]*[34][0-9](;[0-9]+)*m")
BLAMES_PEEL = "this is a mistake in peel"


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def stage(layers: int, name: str = "fit") -> Iterator[Any]:
    for layer in range(1, layers + 1):
        yield Progress(name, layer, layers, f"layer {layer}")
        yield layer


def console(
    stderr: io.StringIO, seconds: float = 0.0, env: dict[str, str] | None = None, **config: Any
) -> Console:
    """A console whose clock goes on by `seconds` whenever it is asked."""
    ticks = iter(range(10**6))
    made = Console(
        stdout=io.StringIO(),
        stderr=stderr,
        env={"TERM": "xterm"} | (env or {}),
        clock=lambda: next(ticks) * seconds,
    )
    made.configure(ConsoleConfig(**config))
    return made


@given(st.integers(1, 200), st.sampled_from([0.0, 0.7, 6.0]))
def test_progress_off_a_terminal_is_plain_lines_and_not_too_many(layers: int, seconds: float) -> None:
    stderr = io.StringIO()
    assert list(console(stderr, seconds).follow(stage(layers))) == list(range(1, layers + 1))
    text = stderr.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[0].startswith(f"fit 1/{layers} layer 1")
    assert lines[-1].startswith(f"fit {layers}/{layers} layer {layers}")
    assert len(lines) <= 2 + layers * seconds / 5
    if seconds == 6.0:
        assert len(lines) == layers


def test_plain_lines_tell_the_time_left() -> None:
    stderr = io.StringIO()
    list(console(stderr, 60).follow(stage(4)))
    assert stderr.getvalue().splitlines() == [
        "fit 1/4 layer 1",
        "fit 2/4 layer 2, 2:00 left",
        "fit 3/4 layer 3, 1:00 left",
        "fit 4/4 layer 4",
    ]


def test_the_same_stage_of_the_next_checkpoint_starts_anew() -> None:
    stderr = io.StringIO()
    shown = console(stderr)
    list(shown.follow([*stage(3), *stage(3)]))
    assert [line.split()[1] for line in stderr.getvalue().splitlines()] == ["1/3", "3/3", "1/3", "3/3"]


@pytest.mark.parametrize("env", [{"CI": "true"}, {"TERM": "dumb"}])
def test_a_ci_job_gets_plain_lines_even_on_a_terminal(env: dict[str, str]) -> None:
    stderr = Terminal()
    list(console(stderr, env=env).follow(stage(3)))
    assert stderr.getvalue() == "fit 1/3 layer 1\nfit 3/3 layer 3\n"


@pytest.mark.parametrize(
    ("env", "config", "coloured"),
    [
        ({}, {}, True),
        ({"NO_COLOR": "1"}, {}, False),
        ({}, {"color": False}, False),
        ({"NO_COLOR": ""}, {}, True),
    ],
)
def test_a_terminal_gets_a_bar_in_the_colours_asked_for(
    env: dict[str, str], config: Any, coloured: bool
) -> None:
    stderr = Terminal()
    shown = console(stderr, env=env, **config)
    for layer in shown.follow([*stage(3), *stage(2, "score\x1b[31m")]):
        shown.note(f"[bold]note[/bold] {layer}")
    text = stderr.getvalue()
    assert "\x1b[2K" in text  # a line is erased: the bar is drawn in place
    assert bool(COLOUR.search(text)) is coloured
    assert "[bold]note[/bold] 3" in text
    assert "score\\x1b[31m" in text


def test_quiet_says_nothing_but_errors() -> None:
    stderr = io.StringIO()
    shown = console(stderr, quiet=True, verbose=True)
    list(shown.follow(stage(3)))
    shown.note("a")
    shown.warn("b")
    shown.detail("c")
    shown.error("d")
    assert stderr.getvalue() == "error: d\n"


def test_a_message_spells_out_what_would_steer_the_terminal() -> None:
    stderr = io.StringIO()
    console(stderr).warn("tensor a\x1b]0;b\x07\r")
    assert stderr.getvalue() == "warning: tensor a\\x1b]0;b\\x07\\r\n"


def test_verbose_says_more() -> None:
    stderr = io.StringIO()
    console(stderr).detail("a")
    console(stderr, verbose=True).detail("b")
    console(stderr, env={"PEEL_DEBUG": "1"}).detail("c")
    console(stderr, env={"PEEL_DEBUG": "0"}).detail("d")
    assert stderr.getvalue() == "b\nc\n"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("no_color", [None, "", "1"])
@pytest.mark.parametrize("flag", [None, True, False])
def test_colours_follow_the_flag_then_no_color_then_the_stream(
    terminal: bool, no_color: str | None, flag: bool | None
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    made = console(io.StringIO(), env={} if no_color is None else {"NO_COLOR": no_color}, color=flag)
    assert made.color(stream) is (flag if flag is not None else terminal and not no_color)


def test_a_path_is_the_result_for_a_program_and_a_note_for_a_person() -> None:
    for stdout, out, err in ((io.StringIO(), "acts.h5\n", ""), (Terminal(), "", "wrote acts.h5\n")):
        shown = Console(stdout=stdout, stderr=io.StringIO(), env={})
        shown.written(Path("acts.h5"))
        shown.finish()
        assert (stdout.getvalue(), shown.stderr.getvalue()) == (out, err)


@given(st.text(st.characters(codec="utf-8")))
def test_nothing_printed_can_steer_a_terminal(text: str) -> None:
    shown = printable(text)
    assert all(map(is_visible, shown))
    if all(map(is_visible, text)) and "::" not in text and "##" not in text:
        assert shown == text


class OutOfMemoryError(RuntimeError):
    """What torch calls its own; recognised by its name, because peel's command line must not import torch."""


ENDS: dict[str, tuple[Callable[[], BaseException], int, str]] = {
    "usage": (lambda: errors.UsageError("bad flag"), 2, "error: bad flag"),
    "checkpoint": (lambda: errors.CheckpointError("no index"), 3, "error: no index"),
    "calibration": (lambda: errors.CalibrationError("too short"), 3, "error: too short"),
    "artefact": (lambda: errors.ArtefactError("truncated"), 3, "error: truncated"),
    "resource": (lambda: errors.ResourceError("too large"), 3, "error: too large"),
    "replay": (lambda: errors.ReplayError("not reproduced"), 1, "error: not reproduced"),
    "interrupted": (KeyboardInterrupt, 130, "what was done is kept, and the same command goes on from there"),
    "disk": (
        lambda: OSError(errno.ENOSPC, "No space left on device", "a.h5"),
        3,
        "no space left on the disk",
    ),
    "quota": (lambda: OSError(errno.EDQUOT, "over", "a.h5"), 3, "no space left on the disk"),
    "file-size": (lambda: OSError(errno.EFBIG, "big", "a.h5"), 3, "no space left on the disk"),
    "hdf5-disk": (
        lambda: RuntimeError("write failed: No space left on device"),
        3,
        "no space left on the disk",
    ),
    "memory": (MemoryError, 3, "error: out of memory (MemoryError); try a smaller --batch-size"),
    "cuda-memory": (lambda: OutOfMemoryError("CUDA"), 3, "--dtype bfloat16"),
    "cpu-memory": (lambda: RuntimeError("DefaultCPUAllocator: can't allocate"), 3, "error: out of memory"),
    "permission": (
        lambda: PermissionError(errno.EACCES, "Permission denied", "a.h5"),
        3,
        "a.h5: Permission denied",
    ),
    "no-memory": (lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), 3, "error: out of memory"),
    "disk-error": (lambda: OSError(errno.EIO, "Input/output error"), 3, "Input/output error; check the disk"),
    "mistake": (lambda: KeyError("x"), 3, "error: internal error: KeyError: 'x' at options.py:"),
    "empty": (AssertionError, 3, "error: internal error: AssertionError at"),
}


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("verbose", [False, True])
def test_each_kind_of_failure_has_its_exit_code_and_leaves_stdout_empty(
    kind: str, verbose: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PEEL_DEBUG", raising=False)
    make, code, says = ENDS[kind]

    @with_options()
    def toy(console: Console) -> int:
        console.result("half of a result")
        raise make()

    assert run(["toy", *(["-v"] if verbose else [])], build_app({"toy": toy})) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert ("Traceback" in err) is (verbose and kind != "interrupted")
    assert (BLAMES_PEEL in err) is (kind in ("mistake", "empty"))


@pytest.mark.parametrize(
    "arguments", [[], ["tow"], ["toy", "--sceme", "x"], ["toy", "extra"], ["toy", "--seed"], ["--nope"]]
)
def test_a_wrong_command_line_is_exit_code_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments, build_app({"toy": with_options(FitConfig)(lambda: 0)})) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "--help'" in err
    assert "Traceback" not in err


def test_version_and_help_are_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"peel {__version__}\n"
    assert run(["--help"]) == 0
    assert "Usage: peel" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 1])
def test_the_exit_code_is_what_the_command_returns(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    @with_options()
    def toy(console: Console) -> int:
        console.result("a")
        console.result("b\n")
        return code

    assert run(["toy"], build_app({"toy": toy})) == code
    assert capsys.readouterr().out == "a\nb\n"


TOY = """
import sys
from peelcli.cli.console import Console
from peelcli.cli.main import build_app, run
from peelcli.cli.options import with_options

@with_options()
def toy(console: Console) -> int:
    console.note("at work")
    console.result("\\u2192 result " * int(sys.argv[1]))
    return 1

sys.exit(run(["toy"] + sys.argv[2:], build_app({"toy": toy})))
"""


def toy(length: int, wrap: tuple[str, ...] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the toy command in a process of its own; its result has `length` pieces, its exit code is 1."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PEEL_", "PYTHON"))}
    env |= {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    command = [*wrap, sys.executable, "-c", TOY, str(length)]
    return subprocess.run(command, env=env, text=True, timeout=60, check=False, **streams)


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """The end for writing of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_closed_pipe_is_quiet_and_keeps_the_exit_code(length: int, closed_pipe: int) -> None:
    done = toy(length, stdout=closed_pipe)
    assert (done.returncode, done.stderr) == (1, "at work\n")


def test_a_closed_stderr_ends_the_command_without_a_result(closed_pipe: int) -> None:
    done = toy(1, stderr=closed_pipe)
    assert (done.returncode, done.stdout) == (3, "")


def test_stdout_may_be_closed_from_the_start() -> None:
    done = toy(1, wrap=("bash", "-c", 'exec "$@" >&-', "bash"))
    assert (done.returncode, done.stderr) == (1, "at work\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_stdout_is_exit_code_three() -> None:
    with open("/dev/full", "w") as full:
        done = toy(1, stdout=full)
    assert done.returncode == 3
    assert "no space left on the disk" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_narrow_encoding_spells_out_what_it_lacks() -> None:
    done = toy(1, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (1, "\\u2192 result \n")


HEAVY = ("torch", "transformers", "accelerate", "h5py", "yaml", "numpy", "safetensors")


def test_the_command_line_starts_light() -> None:
    code = f"import sys, peelcli.cli.main; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("first", ["console.hush_libraries()", "from transformers.utils import logging"])
def test_libraries_keep_to_warnings_whether_hushed_before_or_after(first: str) -> None:
    code = f"""
from peelcli.cli.console import Console
console = Console()
{first}
console.hush_libraries()
from transformers.utils import logging
console.close()
print(logging.get_verbosity() == logging.WARNING, logging.is_progress_bar_enabled())
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True False\n", done.stderr
