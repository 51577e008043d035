"""Progress on a terminal: one rich bar per stage, with layer, rate and time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import rich.console
import rich.progress
from rich.markup import escape
from rich.text import Text

from peelcli.progress import Progress, printable


class _Terminal(rich.console.Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process with exit code 1, which means "flagged" here


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
    """The console that prints above the bar, and the function that moves it; no trace of it stays."""
    terminal = _Terminal(file=stderr, no_color=not color, force_terminal=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[detail]}", markup=False),
        _Rate(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=terminal, transient=True, redirect_stdout=False) as shown:
        last = Progress("", 0, 0)

        def show(event: Progress) -> None:
            nonlocal last
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
