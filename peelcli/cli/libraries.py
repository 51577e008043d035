"""What libraries print, log and warn of while a command runs: none of it reaches a terminal or the result as it is.

Their texts carry names from files and advice for programmers. Python's streams, the handlers of loggers that write
there, and the descriptors 1 and 2 that C code writes to are all led to one function, line by line.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, TextIO

Take = Callable[[str, str], None]  # the library's name, a line that it printed
UNKNOWN = "library"  # the name where C code printed
LONGEST_LINE = 64 * 1024  # bytes; longer ones are cut in pieces


class _Lines:
    """Splits text that arrives in pieces into lines."""

    def __init__(self, take: Take) -> None:
        self.take = take
        self.left = b""
        self.lock = threading.Lock()

    def add(self, data: bytes, library: str) -> None:
        with self.lock:
            *lines, self.left = (self.left + data).replace(b"\r", b"\n").split(b"\n")
            if len(self.left) > LONGEST_LINE:
                lines, self.left = [*lines, self.left], b""
        for line in filter(bytes.strip, lines):
            self.take(library, line.decode("utf-8", "backslashreplace"))

    def end(self) -> None:
        """Emit the last line if it has no newline."""
        if self.left:
            self.add(b"\n", UNKNOWN)


class _Stream(io.RawIOBase):
    """Replaces sys.stdout and sys.stderr; finds the printing library from the call stack."""

    def __init__(self, take: Take) -> None:
        super().__init__()
        self.lines = _Lines(take)

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        content = bytes(data)  # type: ignore[call-overload]
        self.lines.add(content, _library_of(sys._getframe(1)))
        return len(content)


def _library_of(frame: FrameType | None) -> str:
    """The package, outside the standard library and peel, that `frame` belongs to or was called from."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if name and name not in sys.stdlib_module_names and name not in ("peelcli", "__main__"):
            return name
        frame = frame.f_back
    return UNKNOWN


@contextmanager
def python_output(take: Take) -> Iterator[None]:
    """Redirect Python's two streams, and logging handlers that write to a stream, to `take`."""
    raw = _Stream(take)
    stream = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)  # type: ignore[type-var]
    before = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = stream
    # Not by `setStream`, which flushes a stream that may be closed by now.
    handlers = [(handler, handler.stream) for handler in _stream_handlers()]
    for handler, _ in handlers:
        handler.stream = stream
    try:
        yield
    finally:
        raw.lines.end()
        sys.stdout, sys.stderr = before
        for handler, own in handlers:
            handler.stream = own
        for handler in _stream_handlers():  # of libraries that were imported meanwhile
            if handler.stream is stream:
                handler.stream = sys.stderr


def _stream_handlers() -> list[logging.StreamHandler[TextIO]]:
    """The stream handlers of all loggers, without subclasses such as file handlers."""
    loggers = [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]
    return [
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if type(handler) is logging.StreamHandler
    ]


class NativeOutput:
    """Redirects the descriptors 1 and 2, which C code writes to, away from the terminal and the result.

    Without `take` what is written there is dropped. With it, a file without a name keeps it until `drain`: a pipe
    would need a reader, and C code that holds Python's lock would wait for it for ever.
    """

    def __init__(self, take: Take | None) -> None:
        self._lines = None if take is None else _Lines(take)
        self._file: IO[bytes] | None = None
        if take is not None:
            import tempfile  # what help does not need is not imported for it

            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # `close` closes it
        self._passed_on = 0  # bytes of the file
        self._kept: dict[
            int, tuple[int, TextIO]
        ] = {}  # descriptor: where it led before, and what writes there

    def lead_away(self, number: int, stream: TextIO | None) -> TextIO | None:
        """Redirect the descriptor `number`; returns a stream to the original target, for use in place of `stream`."""
        if stream is None:
            self._fill(number)
            return None
        if _number_of(stream) != number:  # replaced already, as in tests
            return stream
        stream.flush()
        kept = os.dup(number)
        own = open(kept, "w", encoding=stream.encoding, errors=stream.errors)  # noqa: SIM115  # `close` closes it
        self._kept[number] = kept, own
        if number == 2 and faulthandler.is_enabled():
            faulthandler.enable(kept)
        self._point(number)
        return own

    def drain(self) -> None:
        """Pass on what C code has written since the last call."""
        if self._file is None or self._lines is None:
            return
        while written := os.pread(self._file.fileno(), LONGEST_LINE, self._passed_on):
            self._passed_on += len(written)
            self._lines.add(written, UNKNOWN)

    def close(self) -> None:
        """Restore the descriptors."""
        for number, (kept, own) in self._kept.items():
            os.dup2(kept, number)
            if number == 2 and faulthandler.is_enabled():
                faulthandler.enable(number)
            with suppress(OSError):  # what a failed write left behind cannot be written now either
                own.close()
        self._kept.clear()
        self.drain()
        if self._file is not None and self._lines is not None:
            self._lines.end()
            self._file.close()

    def _point(self, number: int) -> None:
        if self._file is not None:
            os.dup2(self._file.fileno(), number)
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        if nowhere != number:
            os.close(nowhere)

    def _fill(self, number: int) -> None:
        """Open a descriptor that was closed at start, so that no later file gets it and receives C code's output."""
        try:
            os.fstat(number)
        except OSError:
            self._point(number)


def _number_of(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
