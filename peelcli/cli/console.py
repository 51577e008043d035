"""All output: the result on stdout, completely or not at all, and everything else on stderr."""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from peelcli.cli import signals
from peelcli.cli.libraries import NativeOutput, Take, python_output
from peelcli.config import ConsoleConfig
from peelcli.records.printable import printable
from peelcli.records.progress import Progress

DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
EVERY_SECONDS = 5.0  # between two plain lines of one stage
LONGEST_LINE, ITS_END = 4000, 1000  # characters of one line of a message, and how many of them end it
MOST_LINES = 200  # of one message
Show = Callable[[Progress], None]
T = TypeVar("T")


class Console:
    """A command's output. Messages go to stderr at once; results wait for `finish`."""

    def __init__(
        self,
        *,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        env: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stdout = sys.stdout if stdout is None else stdout
        self.stderr = sys.stderr if stderr is None else stderr
        self.env = os.environ if env is None else env
        self.config = ConsoleConfig()
        self.clock = clock
        self._results: list[str] = []
        self._live: Any = None  # the rich console of a progress bar, while one is shown
        self._libraries = ExitStack()  # what leads their output here, while they run
        self._native: NativeOutput | None = None
        self._lock = threading.RLock()

    def configure(self, config: ConsoleConfig) -> None:
        """Apply the output settings once they are known."""
        self.config = config

    @property
    def verbose(self) -> bool:
        """Whether tracebacks and library messages are shown."""
        return self.config.verbose or self.env.get("PEEL_DEBUG", "") not in ("", "0")

    @property
    def interactive(self) -> bool:
        """Whether stderr is an interactive terminal that can move its cursor, and not a CI job's log."""
        return _is_terminal(self.stderr) and not self.env.get("CI") and self.env.get("TERM") != "dumb"

    @property
    def stdout_is_terminal(self) -> bool:
        """Whether the result is read by a person and not by a program."""
        return _is_terminal(self.stdout)

    def color(self, stream: TextIO) -> bool:
        """Whether `stream` may carry colours: by `--color`, else NO_COLOR, else whether it is a terminal."""
        if self.config.color is not None:
            return self.config.color
        return _is_terminal(stream) and not self.env.get("NO_COLOR") and self.env.get("TERM") != "dumb"

    def unicode(self, stream: TextIO) -> bool:
        """Whether the encoding of `stream` has the block characters of trend lines."""
        try:
            "▁█".encode(stream.encoding or "ascii")
        except (AttributeError, LookupError, UnicodeEncodeError):
            return False
        return True

    def width(self, on_terminal: bool) -> int:
        """Width of the result in columns: COLUMNS, else the terminal's width if stdout is one, else 80."""
        given = self.env.get("COLUMNS", "")
        if given.isdecimal() and int(given):
            return int(given)
        with suppress(OSError, ValueError):
            return (os.get_terminal_size(self.stdout.fileno()).columns if on_terminal else 0) or 80
        return 80

    def note(self, message: str) -> None:
        """Print a message for information."""
        if not self.config.quiet:
            self._say(message)

    def detail(self, message: str) -> None:
        """Print a message that is only shown with --verbose."""
        if self.verbose and not self.config.quiet:
            self._say(message)

    def warn(self, message: str) -> None:
        """Print a warning that the user should act on."""
        if not self.config.quiet:
            self._say(f"warning: {message}")

    def error(self, message: str, *more: str) -> None:
        """Print why there is no result, in one or more lines. Never raises, since no other channel is left."""
        with suppress(OSError):
            self._say(f"error: {message}", *more)

    def result(self, text: str) -> None:
        """Keep a piece of the result for stdout until the command has succeeded."""
        self._results.append(text if text.endswith("\n") else text + "\n")

    def written(self, path: Path) -> None:
        """Name a written file: on stdout for a program, as a message for a person."""
        if self.stdout_is_terminal:
            self.note(f"wrote {path}")
            return
        name = str(path)
        if _is_one_plain_line(name):
            self.result(name)
        else:  # as it is, no program could read it back, and a CI runner might obey it
            self.warn(f"{name}: the special characters of this path are spelt out in the result")
            self.result(printable(name, LONGEST_LINE))

    def finish(self) -> None:
        """Write the whole result at once. Raises OSError, such as BrokenPipeError if the reader is gone."""
        text, self._results = "".join(self._results), []
        if not text:
            return
        if self.stdout is None:  # the process was started with stdout closed
            raise BrokenPipeError
        with signals.deferred():
            _write(self.stdout, text)

    @contextmanager
    def progress(self) -> Iterator[Show]:
        """A function that shows a stage's progress: a bar on a terminal, else a line every few seconds."""
        if self.config.quiet:
            yield lambda event: signals.check()
        elif self.interactive:
            with self._bar() as show:
                yield show
        else:
            yield _Lines(self._say, self.clock)

    def follow(self, events: Iterable[Any]) -> Iterator[Any]:
        """The results among the `events` of a stage. Progress events are shown and removed."""
        with self.progress() as show:
            for event in events:
                if isinstance(event, Progress):
                    self._show(event, show)
                else:
                    yield event

    def drive(self, steps: Generator[Progress, None, T]) -> T:
        """Run a stage to its end, showing its progress; returns its result."""
        with self.progress() as show:
            while True:
                try:
                    self._show(next(steps), show)
                except StopIteration as end:
                    return cast(T, end.value)

    def _show(self, event: Progress, show: Show) -> None:
        if event.note:
            self.note(event.note)
        show(event)

    def hush_libraries(self) -> None:
        """Take over what libraries print, and have them work offline and without bars; call it before importing them.

        --verbose shows what they say, escaped and under their names; otherwise nobody sees it. Ends with `close`.
        """
        for name in DISTRIBUTED:  # started from a rank of a training job, it is still no rank of it
            os.environ.pop(name, None)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if self.verbose else "warning")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Threads that spin while they wait make a busy machine many times slower, an idle one hardly faster.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._take_over()
        if "transformers" in sys.modules:  # imported already: the variables come too late
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            if not self.verbose:
                transformers_logging.set_verbosity_warning()

    def _take_over(self) -> None:
        if self._native is not None:
            return
        shown = self.verbose and not self.config.quiet
        self._native = NativeOutput(self._pass_on if shown else None)
        self._libraries.callback(self._give_back, self.stdout, self.stderr)
        self.stdout = cast(TextIO, self._native.lead_away(1, self.stdout))
        self.stderr = cast(TextIO, self._native.lead_away(2, self.stderr))
        signals.speak_through(self.stderr)
        nobody: Take = lambda library, line: None  # noqa: E731
        self._libraries.enter_context(python_output(self._pass_on if shown else nobody))

    def _give_back(self, stdout: TextIO, stderr: TextIO) -> None:
        native, self._native = self._native, None
        if native is not None:
            native.drain()
            native.close()
        self.stdout, self.stderr = stdout, stderr
        signals.speak_through(stderr)

    def _pass_on(self, library: str, line: str) -> None:
        """Show a line that a library printed. Never raises: the library would report it by printing again."""
        with suppress(OSError):
            self._print(printable(f"{library}: {line}"))

    def close(self) -> None:
        """Let libraries print to their original streams again."""
        self._libraries.close()

    def abandon(self) -> None:
        """Close both streams, so that buffered output cannot change the exit code."""
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                abandon(stream)

    def _say(self, *lines: str) -> None:
        """Print a message; every text on the way to stderr goes through here, and is escaped here.

        Lines after the first are indented: nothing that a file brought along begins a line of its own.
        """
        if self._native is not None:
            self._native.drain()
        if len(lines) > MOST_LINES:
            half, more = MOST_LINES // 2, len(lines) - MOST_LINES
            lines = (*lines[:half], f"... ({more} more lines)", *lines[-half:])
        self._print("\n  ".join(printable(line, LONGEST_LINE, ITS_END) for line in lines))

    def _print(self, text: str) -> None:
        with self._lock:
            if self._live is not None:
                self._live.print(text, markup=False, highlight=False, soft_wrap=True)
            elif self.stderr is not None:
                _write(self.stderr, text + "\n")

    @contextmanager
    def _bar(self) -> Iterator[Show]:
        from peelcli.cli.progress_bar import bar  # rich is imported for those who see it

        with bar(self.stderr, color=self.color(self.stderr)) as (live, show):
            self._live = live
            try:
                yield show
            finally:
                self._live = None


class _Lines:
    """Progress as plain lines: the first and the last of a stage, and one every few seconds in between."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        self.say, self.clock = say, clock
        self.stage, self.started, self.first, self.done, self.said = "", 0.0, 0, 0, 0.0

    def __call__(self, event: Progress) -> None:
        signals.check()
        now = self.clock()
        new = event.stage != self.stage or event.done < self.done  # the same stage of the next checkpoint
        if new:
            self.stage, self.started, self.first = event.stage, now, event.done
        self.done = event.done
        if new or event.done >= event.total or now - self.said >= EVERY_SECONDS:
            self.said = now
            self.say(
                f"{event.stage} {event.done}/{event.total} {event.detail}".rstrip() + self._left(event, now)
            )

    def _left(self, event: Progress, now: float) -> str:
        """The estimated time left, once enough is done to estimate it."""
        if not self.first < event.done < event.total:
            return ""
        seconds = (now - self.started) / (event.done - self.first) * (event.total - event.done)
        return f", {int(seconds) // 60}:{int(seconds) % 60:02d} left"


def abandon(stream: TextIO) -> None:
    """Redirect a failed stream to the null device, because Python's flush at exit would change the exit code."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _write(stream: TextIO, text: str) -> None:
    """Write and flush. Characters that the stream's encoding lacks are escaped."""
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError:
        abandon(stream)
        raise


def _is_one_plain_line(name: str) -> bool:
    """Whether a path can be printed unchanged on its own line: no control character, and no CI runner's command."""
    lines = any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in name)
    return not lines and not name.lstrip().startswith("::") and "##" not in name


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()
