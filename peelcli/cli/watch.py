"""`peel watch`: audit a run's checkpoints as they appear."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peelcli.cli.audit import Auditor
from peelcli.cli.console import Console
from peelcli.cli.options import with_options
from peelcli.cli.reporting import (
    FLAGGED,
    check_format,
    extend_history,
    judge_runs,
    log_figures,
    read_if_any,
    show,
)
from peelcli.cli.workspaces import workspace_for
from peelcli.config import (
    AuditConfig,
    Configs,
    ExtractConfig,
    FitConfig,
    ReportConfig,
    TrackConfig,
    TrainedSchemeConfig,
    WatchConfig,
    parse_duration,
)
from peelcli.errors import ArtefactError, CalibrationError, CheckpointChangedError, CheckpointError

if TYPE_CHECKING:
    from peelcli.tracking.series import Member

SETTLING = 1.0  # seconds between the two looks of --once

Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Directory to which a run saves its checkpoints; may not be there yet."
    ),
]


@with_options(
    ExtractConfig, TrainedSchemeConfig, FitConfig, ReportConfig, TrackConfig, AuditConfig, WatchConfig
)
def watch(directory: Directory, configs: Configs, console: Console) -> int:
    """Audit checkpoints as they appear, each once it is whole; stop with Ctrl-C or SIGTERM, or as asked for."""
    check_format(configs[ReportConfig], console, to_file=False)
    console.hush_libraries()
    watcher = _Watcher(directory, configs, console)
    try:
        watcher.run()
    except KeyboardInterrupt:
        console.note("stopped watching; what was done is kept, and the same command goes on from there")
    except BrokenPipeError:  # nobody reads the reports any more
        console.abandon()
    return watcher.exit_code()


class _Watcher:
    """Looks for checkpoints, audits and reports them, and keeps the exit code."""

    def __init__(self, directory: Path, configs: Configs, console: Console) -> None:
        from peelcli.tracking.watch import Watch

        self.configs, self.console = configs, console
        self.settings = configs[WatchConfig]
        self.watched = Watch(directory)
        self.auditor = Auditor(configs, console, read_if_any(configs[TrackConfig].baseline))
        self.flagged, self.failed = False, False

    def exit_code(self) -> int:
        """1 if anything was flagged, else 3 if a checkpoint could not be audited, else 0."""
        if self.flagged and not self.configs[ReportConfig].exit_zero:
            return FLAGGED
        return CheckpointError.exit_code if self.failed else 0

    def run(self) -> None:
        """Continue until one of the settings says to stop."""
        settings, console = self.settings, self.console
        idle_since = time.monotonic()
        max_idle = None if settings.max_idle is None else parse_duration(settings.max_idle)
        pause = SETTLING if settings.once else parse_duration(settings.every)
        looks = 0
        while True:
            found = self.watched.look()
            looks += 1
            for warning in self.watched.warnings:
                console.warn(warning)
            for member in found:
                self.audit(member)
                if settings.until_step is not None and (member.step or 0) >= settings.until_step:
                    console.note(f"step {member.step} is reached; stopped watching")
                    return
            if found or self.watched.restless:
                idle_since = time.monotonic()
            if settings.once and looks > 1:
                self._leave()
                return
            if max_idle is not None and time.monotonic() - idle_since >= max_idle:
                console.note(f"nothing new for {settings.max_idle}; stopped watching")
                return
            time.sleep(pause)

    def _leave(self) -> None:
        """Report the checkpoints that --once skipped."""
        if self.watched.restless:
            self.console.note(f"still being written, not audited: {', '.join(self.watched.restless)}")
        if not self.watched.directory.is_dir():
            raise CheckpointError(
                f"{self.watched.directory}: no such directory; name the one to which checkpoints are saved, or leave "
                "out --once to wait for it"
            )

    def audit(self, member: Member) -> None:
        """Audit one checkpoint and report it at once. An error does not end the watch."""
        console, settings = self.console, self.configs[ReportConfig]
        console.note(f"new: {member}")
        workspace = workspace_for(member.path, self.configs[AuditConfig].output, alone=False)
        before = len(self.auditor.runs)
        try:
            self.auditor.audit(member.path, workspace)
        except CheckpointChangedError as error:
            console.warn(f"{error} Going on with the next checkpoint.")
            return
        except (CheckpointError, ArtefactError, CalibrationError) as error:
            if not member.path.is_dir():
                console.warn(f"{member}: was removed before it could be audited")
                return
            console.error(*error.lines)
            self.failed = True
            return
        if len(self.auditor.runs) > before:
            *_, result = judge_runs(self.auditor.runs, settings, self.auditor.baseline)
            self.flagged |= bool(result.flagged or result.network_flagged)
            extend_history(self.configs[TrackConfig].history, [result], console)
            show([result], settings, console, to_file=False)
            log_figures(self.configs[TrackConfig].log_to, [result], console)
        console.finish()
