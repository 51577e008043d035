"""The `peel` command: the table of commands, the only try/except and the only exit.

Exit codes: 0 audited, nothing flagged · 1 flagged · 2 wrong usage · 3 could not audit · 130, 143, 129 interrupted by
SIGINT (Ctrl-C), SIGTERM, SIGHUP.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NoReturn

import typer

from peelcli import __version__
from peelcli.cli import signals
from peelcli.cli.audit import audit
from peelcli.cli.console import Console
from peelcli.cli.demo import demo
from peelcli.cli.explain import explain as explain_layer
from peelcli.cli.extract import extract
from peelcli.cli.fit import fit
from peelcli.cli.graft import graft
from peelcli.cli.report import report
from peelcli.cli.verify import verify
from peelcli.cli.watch import watch
from peelcli.errors import PeelError
from peelcli.records.printable import LONGEST

USAGE, FAILED, BY_SIGNAL = 2, 3, 128  # and the signal's number
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors does not set errno
NO_SPACE_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
NO_MEMORY_WORDS = "DefaultCPUAllocator"  # torch raises a plain RuntimeError where the CPU's memory is out

# typer carries click inside in newer versions and imports it in older ones; its own BadParameter is in both.
ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

# One line per command. Their modules import torch and transformers inside functions, so that help is quick.
COMMANDS: dict[str, Callable[..., Any]] = {
    "audit": audit,
    "extract": extract,
    "fit": fit,
    "report": report,
    "explain": explain_layer,
    "watch": watch,
    "verify": verify,
    "graft": graft,
    "demo": demo,
}


def build_app(commands: Mapping[str, Callable[..., Any]]) -> typer.Typer:
    """The typer application of `commands`, by name. A command returns its exit code."""
    app = typer.Typer(
        name="peel",
        help="Audit transformer checkpoints layer by layer against light, local, low-bit references.",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool,
            typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version),
        ] = False,
    ) -> None:
        pass  # there for its option alone

    for name, command in commands.items():
        app.command(name)(command)
    return app


app = build_app(COMMANDS)


def main() -> NoReturn:
    """Run the process's command line and end the process with the exit code."""
    if "_PEEL_COMPLETE" in os.environ:  # the shell asks for completions
        app(prog_name="peel")
    signals.install()
    code = run(sys.argv[1:])
    if "triton" not in sys.modules:  # it counts on being collected, and complains
        gc.freeze()  # at its end Python would look for garbage in all that was imported, which takes a second
    signals.uninstall()
    sys.exit(code)


def run(arguments: Sequence[str], app: typer.Typer = app) -> int:
    """Run one command line and return its exit code. stdout gets the complete result or nothing."""
    console = Console()
    try:
        return _ended(arguments, app, console)
    finally:
        console.close()


def _ended(arguments: Sequence[str], app: typer.Typer, console: Console) -> int:
    """The exit code of the command line, after its outcome was reported to the user."""
    code = FAILED
    try:
        with signals.listening():
            code = _invoke(app, arguments, console)
            console.finish()
    except BrokenPipeError:  # the reader has gone: nothing to tell it, and the exit code stays what it was
        console.abandon()
    except SystemExit as stop:  # a library's: rich ends the process where the pipe of its help is closed
        code = FAILED if stop.code else 0
    except (KeyboardInterrupt, typer.Abort):
        code = _interrupted(console)
    except Exception as error:  # noqa: BLE001  # where every other failure becomes a message and a code
        if signals.received() is not None:  # a library made an error of its own of the interruption
            return _interrupted(console)
        code, lines = explain(error)
        console.error(*lines, *(_traceback(error) if console.verbose else ()))
    return code


def _interrupted(console: Console) -> int:
    number = signals.received() or signal.SIGINT
    by = "" if number == signal.SIGINT else f" by {signals.name_of(number)}"
    console.error(f"interrupted{by}; what was done is kept, and the same command goes on from there")
    return BY_SIGNAL + number


def explain(error: Exception) -> tuple[int, tuple[str, ...]]:
    """The exit code for `error`, and the lines of its message."""
    if isinstance(error, PeelError):
        return error.exit_code, error.lines
    if isinstance(error, ClickException):
        return USAGE, (_usage(error),)
    return FAILED, (_failure(error),)


def _failure(error: Exception) -> str:
    """The message for an error that peel did not raise itself."""
    text = _text(error)
    if getattr(error, "errno", None) in NO_SPACE or any(words in text for words in NO_SPACE_WORDS):
        return f"no space left on the disk ({text}); free some, or go elsewhere with -o/--output"
    no_memory = type(error).__name__ in ("MemoryError", "OutOfMemoryError") or NO_MEMORY_WORDS in text
    if no_memory or getattr(error, "errno", None) == errno.ENOMEM:
        return (
            f"out of memory ({_summary(error)}); try a smaller --batch-size or --seq-len, "
            "--dtype bfloat16, or --device cpu"
        )
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}; check the path and its permissions"
    if isinstance(error, OSError) and error.strerror:
        return f"a file could not be read or written: {error.strerror}; check the disk and try again"
    return (
        f"internal error: {_summary(error)} at {_place(error)}; this is a mistake in peel: "
        "please report it, with what --verbose adds"
    )


def _invoke(app: typer.Typer, arguments: Sequence[str], console: Console) -> int:
    """The exit code of one command line, without typer's own `main`, which would end the process."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("peel", list(arguments), obj=console) as context:
            return command.invoke(context) or 0
    except typer.Exit as stop:
        return stop.exit_code


def _version(context: typer.Context, asked: bool) -> None:
    if asked:
        context.ensure_object(Console).result(f"peel {__version__}")
        raise typer.Exit


def _usage(error: Any) -> str:
    path = error.ctx.command_path if getattr(error, "ctx", None) else "peel"
    return f"{error.format_message().rstrip('.')}; see '{path} --help'"


def _text(error: Exception) -> str:
    try:
        return str(error)
    except Exception as worse:  # noqa: BLE001  # a library's error may fail to say what it is
        return f"its message cannot be read: {type(worse).__name__}"


def _summary(error: Exception) -> str:
    """Type and first line of an unexpected error."""
    return f"{type(error).__name__}: {_text(error)[:LONGEST]}".splitlines()[0].removesuffix(": ")


def _traceback(error: Exception) -> list[str]:
    return [line for entry in traceback.format_exception(error) for line in entry.splitlines()]


def _place(error: Exception) -> str:
    """The place in peel's own code at which `error` was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "peelcli" in frame.filename] or frames
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else "an unknown place"
