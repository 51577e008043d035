"""Progress on a terminal: one rich bar per stage, with layer, rate and time left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import rich.console
import rich.progress
from rich.markup import escape
from rich.text import Text

from peelcli.cli import signals
from peelcli.records.printable import printable
from peelcli.records.progress import Progress


class _Terminal(rich.console.Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process with exit code 1, which means "flagged" here

    @property  # type: ignore[misc]  # rich's can be set too, which nobody does here
    def size(self) -> rich.console.ConsoleDimensions:
        """The terminal's size. rich would ask the descriptors 0 to 2, which are redirected while libraries run."""
        with suppress(OSError, ValueError):
            if "COLUMNS" not in os.environ:
                return rich.console.ConsoleDimensions(*os.get_terminal_size(self.file.fileno()))
        return super().size


class _Rate(rich.progress.ProgressColumn):
    def render(self, task: rich.progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(
            f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="progress.data.speed"
        )


@contextmanager
def bar(stderr: TextIO, *, color: bool) -> Iterator[tuple[rich.console.Console, Callable[[Progress], None]]]:
    """The console that prints above the bar, and the function that moves it. The bar is erased at the end."""
    terminal = _Terminal(file=stderr, no_color=not color, force_terminal=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[detail]}", markup=False),
        _Rate(),
        rich.progress.TimeRemainingColumn(),
    )
    # What is printed meanwhile comes through the console: rich would print it as it is.
    shown = rich.progress.Progress(
        *columns, console=terminal, transient=True, redirect_stdout=False, redirect_stderr=False
    )
    with shown:
        last = Progress("", 0, 0)

        def show(event: Progress) -> None:
            nonlocal last
            signals.check()
            if (
                event.stage != last.stage or event.done < last.done
            ):  # the next stage, or the next checkpoint's
                for task in shown.task_ids:
                    shown.remove_task(task)
                shown.add_task(
                    escape(printable(event.stage)), completed=event.done, total=event.total, detail=""
                )
            last = event
            detail = printable(event.detail)
            shown.update(shown.task_ids[-1], completed=event.done, total=event.total, detail=detail)

        yield terminal, show
