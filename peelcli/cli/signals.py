"""Signals that end the process: the first unwinds it, as Ctrl-C does, and a second ends it at once.

SIGINT, SIGTERM and SIGHUP are alike, but for the exit code (128 + the signal's number). One that was ignored when the
process started, as SIGHUP is under nohup, stays ignored.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# `timeout` sends its signal to the process and to its group, a closed terminal and its shell send SIGHUP each: a
# second signal so soon after the first is no second request.
SAME_REQUEST = 0.2  # seconds
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class Interrupted(KeyboardInterrupt):
    """The first signal, raised as an exception in the main thread."""


class _State:
    received: int | None = None
    listening = False  # whether the first signal may raise where the process stands
    stderr: TextIO | None = None  # where the last words go


def install() -> None:
    """Install the handlers for ending signals, once, in the main thread only."""
    if any(signal.getsignal(number) is _first for number in ENDING):
        return
    caught = [number for number in ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    if not caught:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, caught), name="signals", daemon=True).start()
    for number in caught:
        signal.signal(number, _first)


def uninstall() -> None:
    """Restore the system's handling of ending signals, because the work is finished."""
    for number in ENDING:
        if signal.getsignal(number) is _first:
            signal.signal(number, signal.SIG_DFL)


def received() -> int | None:
    """The number of the first signal; None if none came."""
    return _State.received


def name_of(number: int) -> str:
    """The name of the signal, such as `SIGTERM`."""
    return signal.Signals(number).name


def speak_through(stderr: TextIO | None) -> None:
    """Print the final message to the given console."""
    _State.stderr = stderr


@contextmanager
def listening() -> Iterator[None]:
    """Within the context, a signal raises Interrupted; outside it is only recorded."""
    _State.listening = True
    try:
        check()
        yield
    finally:
        _State.listening = False


@contextmanager
def deferred() -> Iterator[None]:
    """Within the context, signals are deferred; a deferred signal raises Interrupted at the end."""
    before, _State.listening = _State.listening, False
    known = _State.received
    try:
        yield
    finally:
        _State.listening = before
    if known is None:
        check()


def check() -> None:
    """Raise Interrupted for a signal whose exception was lost, for example in a callback of C code."""
    if _State.listening and _State.received is not None:
        raise Interrupted(_State.received)


def _first(number: int, frame: FrameType | None) -> None:
    if _State.received is None:
        _State.received = number
        check()


def _watch(reader: int, caught: list[signal.Signals]) -> None:
    """End the process at a second signal, even while its main thread waits in C code and runs no handler."""
    first: float | None = None
    while True:
        numbers = os.read(reader, 64)
        now = time.monotonic()
        for number in numbers:
            if number not in caught:
                continue
            if first is None:
                first = now
            elif now - first > SAME_REQUEST:
                _end_at_once(number)


def _end_at_once(number: int) -> None:
    words = "error: ended at once by a second signal; the same command goes on from what was done\n"
    with suppress(OSError, ValueError, AttributeError):  # it may be closed, or none: then nobody can be told
        number_of_stderr = (_State.stderr or sys.stderr).fileno()
        cursor = _SHOW_CURSOR if os.isatty(number_of_stderr) else ""
        os.write(number_of_stderr, (cursor + words).encode())
    os._exit(128 + number)
