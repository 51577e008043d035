"""No text reaches a terminal or a CI log but through the console, which escapes it: names in files are hostile."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import EXTRACT, Done, peel, peel_apart, save_ids, save_tiny

from peelcli.checkpoint.library_words import library_words
from peelcli.cli.console import Console
from peelcli.cli.main import build_app, run
from peelcli.cli.options import with_options
from peelcli.config import ConsoleConfig
from peelcli.errors import UsageError
from peelcli.records.printable import harmless_json, printable
from peelcli.records.progress import Progress

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "x\n::error::owned",
    "::add-mask::m",
    "  ::stop-commands::t",
    "\r##[error]y",
    "\x1b[0m::warning::z",
    "##vso[task.complete]",
    "\u202edesrever",
    "zero\u200bwidth\u3164\ufe0f",
    "a\u2028::error::b\u2029c\x85d",
    "\x1b]0;title\x07\x9b31m\x7f",
    "half a pair \ud83d",
)


def assert_harmless(text: str) -> None:
    """No control character but newlines, nothing invisible, and no line that a CI runner obeys."""
    for line in text.split("\n"):
        assert line.isprintable(), repr(line)
        assert not line.lstrip().startswith("::"), line
        assert "##[" not in line, line
        assert "##vso[" not in line, line
    assert not set(text) & set("\u3164\ufe0f"), text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with tensors that no model knows, under hostile names; token ids lie beside it."""
    base = tmp_path_factory.mktemp("hostile")
    weights = save_tiny(base / "ckpt") / "model.safetensors"
    tensors = load_file(weights)
    for name in HOSTILE[:-1]:  # half a pair of surrogates is no UTF-8, which the header is in
        tensors[name] = torch.ones(3)
    save_file(tensors, weights, metadata={"format": "pt"})
    save_ids(base / "ids.npy")
    return base


@pytest.mark.parametrize("flag", ["", "-q", "-v"])
def test_names_of_tensors_reach_stderr_escaped_and_libraries_only_under_verbose(
    flag: str, hostile: Path, tmp_path: Path
) -> None:
    done = peel_apart(
        tmp_path, "extract", hostile / "ckpt", "--data", hostile / "ids.npy", *EXTRACT, *filter(None, [flag])
    )
    assert done.code == 0, done.err
    assert_harmless(done.err)
    assert_harmless(done.out)
    assert ("UNEXPECTED" in done.err) is (flag == "-v")
    assert all(line.startswith("transformers: ") for line in done.err.splitlines() if "UNEXPECTED" in line)
    if flag == "-q":
        assert done.err == ""


NOISE = """
import faulthandler, logging, os, sys, warnings
text = "\\x1b[1m%s\\r::error::owned\\n##[error]x"
def make(logging=logging, os=os, sys=sys, warnings=warnings):
    logging.getLogger("lib").warning(text, "logged")
    logging.getLogger("lib").handlers[0].stream.write(text % "handled" + "\\n")
    warnings.warn(text % "warned")
    print(text % "printed")
    print(text % "told", file=sys.stderr)
    sys.stdout.buffer.write(b"::error::bytes\\n")
    os.write(1, b"::error::native 1\\n")
    os.write(2, b"::error::native 2\\n")
"""


def noisy(*flags: str) -> subprocess.CompletedProcess[str]:
    """A command of which a library prints in every way there is, run in a process of its own."""
    code = f"""
import logging, sys, types
from peelcli.cli.console import Console
from peelcli.cli.main import build_app, run
from peelcli.cli.options import with_options
logging.getLogger("lib").addHandler(logging.StreamHandler())
lib = types.ModuleType("lib")
exec({NOISE!r}, lib.__dict__)

@with_options()
def toy(console: Console) -> int:
    console.hush_libraries()
    lib.make()
    console.note("our own")
    console.result("result")
    return 0

code = run(["toy", *sys.argv[1:]], build_app({{"toy": toy}}))
print("afterwards")
logging.getLogger("lib").warning("afterwards")
sys.exit(code)
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PEEL_", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-c", code, *flags],
        env=env | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "always"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("flags", [(), ("-q",), ("-v",), ("-q", "-v")])
def test_no_way_of_printing_leads_a_library_past_the_console(flags: tuple[str, ...]) -> None:
    done = noisy(*flags)
    assert (done.returncode, done.stdout) == (0, "result\nafterwards\n"), done.stderr
    assert_harmless(done.stderr)
    *told, last = done.stderr.splitlines()
    assert last == "afterwards"
    if flags != ("-v",):
        assert told == ([] if "-q" in flags else ["our own"])
        return
    assert told.count("our own") == 1
    for way in ("logged", "handled", "warned", "printed", "told"):
        (line,) = [line for line in told if way in line and "warnings.warn" not in line]
        assert line.startswith("lib: "), line
    for way in ("bytes", "native 1", "native 2"):
        (line,) = [line for line in told if line.endswith(way)]
        assert line.startswith(("lib: ", "library: ")), line


def failing(error: BaseException, *flags: str) -> Done:
    """A command that ends with `error`."""

    @with_options()
    def toy(console: Console) -> int:
        raise error

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PEEL_DEBUG", raising=False)
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = run(["toy", *flags], build_app({"toy": toy}))
    return Done(code, out.getvalue(), err.getvalue())


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def noted(error: Exception) -> Exception:
    error.add_note("\n".join(HOSTILE))
    return error


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("flags", [(), ("-v",)])
def test_a_failure_names_hostile_things_without_obeying_them(name: str, flags: tuple[str, ...]) -> None:
    for error in (
        UsageError(f"{name}: is wrong", f"{name}: is wrong too"),
        KeyError(name),
        noted(ValueError(name)),
        FileNotFoundError(2, "No such file", name),
        OSError(28, "No space left on device", name),
        MemoryError(name),
    ):
        done = failing(error, *flags)
        assert done.err.startswith("error: ")
        assert_harmless(done.err)


def test_a_message_of_many_lines_begins_none_but_the_first_at_the_margin() -> None:
    done = failing(UsageError("two settings are wrong:", "a: one", "b\nc: two"))
    assert done.err == "error: two settings are wrong:\n  a: one\n  b\\nc: two\n"


@pytest.mark.parametrize("flags", [(), ("-v",)])
def test_an_endless_message_is_cut_and_keeps_its_end(flags: tuple[str, ...]) -> None:
    for text in ("x" * 10_000_000, "x\n" * 1_000_000, "\x1b" * 1_000_000):
        done = failing(UsageError(f"{text}: is wrong; name another"), *flags)
        assert len(done.err) < 100_000
        assert "is wrong; name another" in done.err
        assert len(failing(RuntimeError(text), *flags).err) < 100_000


def test_an_error_that_cannot_say_what_it_is_is_told_all_the_same() -> None:
    assert "UnspeakableError: its message cannot be read: ValueError" in failing(UnspeakableError()).err


@pytest.fixture
def terminal() -> Iterator[tuple[io.TextIOWrapper, int]]:
    """A real terminal: what a program writes to, and where its other end is read."""
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as stream:
        yield stream, ours
    os.close(ours)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bar_shows_hostile_names_escaped(name: str, terminal: tuple[io.TextIOWrapper, int]) -> None:
    stream, ours = terminal
    console = Console(stdout=io.StringIO(), stderr=stream, env={"TERM": "xterm"})
    console.configure(ConsoleConfig(color=False, verbose=True))
    console.hush_libraries()
    try:
        for _ in console.follow([Progress(name, 1, 2, name), 0, Progress(name, 2, 2, name)]):
            print(name, file=sys.stderr)
            console.warn(name)
    finally:
        console.close()
    shown = os.read(ours, 65536).decode()
    ours_only = shown.replace("\x1b[?25l", "").replace("\x1b[?25h", "").replace("\x1b[2K", "")
    assert "\x1b[" not in ours_only.replace("\x1b[1A", "")
    assert not set(ours_only) & set("\u202e\u200b\u2028\u2029\x07\x9b\x85\x7f\u3164\ufe0f")
    assert "::" not in ours_only
    assert "##[" not in ours_only


@pytest.mark.parametrize("name", HOSTILE[:-1])
def test_a_path_that_is_the_result_is_one_harmless_line(name: str, hostile: Path, tmp_path: Path) -> None:
    """Of a checkpoint's directory, whose name the work directory bears."""
    from peelcli.stages.workspace import Workspace

    directory = Workspace.under(tmp_path, tmp_path / name.replace("/", "")).directory
    assert_harmless(str(directory))
    console = Console(stdout=io.StringIO(), stderr=io.StringIO(), env={})
    console.written(Path(name))
    console.finish()
    out, err = console.stdout, console.stderr
    assert isinstance(out, io.StringIO)
    assert isinstance(err, io.StringIO)
    assert out.getvalue().count("\n") == 1
    assert not out.getvalue().lstrip().startswith("::")
    assert "##[" not in out.getvalue()
    assert_harmless(err.getvalue())


def test_a_dry_run_names_a_hostile_checkpoint_escaped(hostile: Path, tmp_path: Path) -> None:
    ckpt = tmp_path / "x\n::error::owned"
    ckpt.symlink_to(hostile / "ckpt")
    done = peel(tmp_path / "home", "audit", ckpt, "--data", hostile / "ids.npy", *EXTRACT, "--dry-run")
    assert done.code == 0, done.err
    assert_harmless(done.out)
    assert "owned" in done.out


ADVICE = {
    "You set `ignore_mismatched_sizes` to `False`, thus raising an error. For details look at the above report!": (
        "RuntimeError"
    ),
    "Loading ckpt requires you to execute the configuration file in that repo on your local machine. Make sure you "
    "have read the code there, then set the option `trust_remote_code=True` to remove this error.": (
        "Loading ckpt requires you to execute the configuration file in that repo on your local machine"
    ),
    "You should probably TRAIN this model on a down-stream task.": "RuntimeError",
    "Unrecognized model in x. Should have a `model_type` key.": (
        "Unrecognized model in x. Should have a `model_type` key"
    ),
    "expected int\n\n  Please open an issue on https://github.com/a/b": "expected int",
    "": "RuntimeError",
}


@pytest.mark.parametrize("said", ADVICE)
def test_what_libraries_advise_is_left_out_of_peels_own_messages(said: str) -> None:
    assert library_words(RuntimeError(said)) == ADVICE[said]


def test_printable_keeps_both_ends_of_what_is_too_long() -> None:
    shown = printable("a" * 50 + "::" + "b" * 50, 20, 5)
    assert shown == "a" * 15 + "... (82 more characters) ... bbbbb"


@given(st.text('#[\\:"u0023ab \n', max_size=40))
def test_json_keeps_its_values_and_holds_no_command(text: str) -> None:
    shown = harmless_json(json.dumps({text: [text]}, indent=2))
    assert json.loads(shown) == {text: [text]}
    assert "##[" not in shown
    assert not any(line.lstrip().startswith("::") for line in shown.splitlines())
