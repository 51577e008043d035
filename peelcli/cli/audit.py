"""`peel audit`: extract, fit and report in one, doing nothing twice."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peelcli.cli.console import Console
from peelcli.cli.options import with_options
from peelcli.cli.reporting import (
    WriteBaseline,
    check_format,
    exit_code,
    extend_history,
    fit_settings,
    judge_runs,
    keep_baseline,
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
)
from peelcli.errors import (
    ArtefactError,
    CalibrationError,
    CheckpointChangedError,
    CheckpointError,
    UsageError,
)
from peelcli.runtime.locks import Lock

if TYPE_CHECKING:
    from peelcli.records import AuditResult, Run
    from peelcli.records.progress import Progress
    from peelcli.stages.audit import AuditPaths
    from peelcli.stages.workspace import Workspace

# What nobody names a directory: someone means a file.
_FILES = (".h5", ".hdf5", ".json", ".csv", ".md", ".xml", ".sarif", ".html", ".txt")
ROLLED_BACK = 2  # how many earlier checkpoints of the run serve for `rollback`

Checkpoints = Annotated[
    list[Path],
    typer.Argument(
        metavar="CKPT...",
        help="Directories with config.json and weights, or of a run that hold such; taken in order of training step.",
    ),
]


@with_options(ExtractConfig, TrainedSchemeConfig, FitConfig, ReportConfig, TrackConfig, AuditConfig)
def audit(
    checkpoints: Checkpoints, configs: Configs, console: Console, write_baseline: WriteBaseline = None
) -> int:
    """Audit checkpoints: which layers are under-optimised, by what evidence, and what to do."""
    check_format(configs[ReportConfig], console, to_file=False)
    console.hush_libraries()
    from peelcli.tracking.series import series_of

    series = series_of(checkpoints)
    for warning in series.warnings:
        console.warn(warning)
    for note in series.notes:
        console.note(note)
    members, alone = series.members, len(series.members) == 1
    output = configs[AuditConfig].output
    if output is not None and output.suffix in _FILES and not output.is_dir():
        raise UsageError(
            f"--output {output}: an audit's is the directory for the files of its stages. For a report in a file send "
            f"stdout there (> {output}), or make it with `peel report`."
        )
    places = [workspace_for(m.path, output, alone=alone and not series.is_run) for m in members]
    one = Auditor(configs, console, read_if_any(configs[TrackConfig].baseline))
    failed: list[str] = []
    for number, (member, workspace) in enumerate(zip(members, places, strict=True), start=1):
        if not alone:
            console.note(f"checkpoint {number} of {len(members)}: {member}")
        try:
            one.audit(member.path, workspace)
        except (CheckpointError, ArtefactError, CalibrationError) as error:
            # One checkpoint's failure is not to cost the others' results. Text that served none yet is everyone's.
            if alone or (isinstance(error, CalibrationError) and one.first is None):
                raise
            console.error(*error.lines)
            failed.append(str(member))
    if failed:
        console.error(
            f"{len(failed)} of {len(members)} checkpoints could not be audited: {', '.join(failed)}"
        )
    report = configs[ReportConfig]
    results = judge_runs(one.runs, report, one.baseline)
    if results:
        extend_history(configs[TrackConfig].history, results, console)
        show(results, report, console, to_file=False)
        keep_baseline(None if failed else write_baseline, results, console)
        log_figures(configs[TrackConfig].log_to, results, console)
    return CheckpointError.exit_code if failed else exit_code(results, report)


class Auditor:
    """Audits the checkpoints of a series one after another, or estimates their cost."""

    def __init__(self, configs: Configs, console: Console, baseline: AuditResult | None = None) -> None:
        self.settings, self.console = configs[AuditConfig], console
        chained = {name: getattr(self.settings, name) for name in ("resume", "overwrite", "wait")}
        self.extract = replace(configs[ExtractConfig], **chained)
        self.fit = replace(fit_settings(configs), **chained)
        self.trained = configs[TrainedSchemeConfig]
        self.baseline = baseline
        self.runs: list[Run] = []
        self.paths: list[Path] = []

    @property
    def first(self) -> Run | None:
        """The run whose tokens all others must share: the baseline's, else the first measured run."""
        if self.baseline is not None:
            return self.baseline.run
        return next((run for run in self.runs if run.data_hash), None)

    def audit(self, checkpoint: Path, workspace: Workspace) -> None:
        """Add the run of one checkpoint to the result, or its estimate in a dry run."""
        from peelcli.report.estimate import render_estimate
        from peelcli.stages.audit import run_audit
        from peelcli.stages.estimate import run_estimate

        if self.settings.dry_run:
            steps = run_estimate(checkpoint, self.extract, self.fit, workspace, trained=self.trained)
            plan = self.console.drive(steps)
            self.console.result(render_estimate(plan))
            return
        earlier = [path for path in self.paths[-ROLLED_BACK:] if self._is_there(path)]

        def attempt(earlier: list[Path]) -> Generator[Progress, None, AuditPaths]:
            return run_audit(
                checkpoint,
                self.extract,
                self.fit,
                workspace,
                earlier=earlier,
                first=self.first,
                trained=self.trained,
            )

        try:
            done = self.console.drive(attempt(earlier))
        except CheckpointChangedError as error:
            if error.directory not in earlier:
                raise
            # A run that keeps its last checkpoints alone removes the earlier ones, which are not what is audited.
            self.console.warn(
                f"{error.directory}: changed or removed meanwhile, so {checkpoint} is audited without it"
            )
            done = self.console.drive(attempt([path for path in earlier if path != error.directory]))
        self.runs.append(done.run)
        self.paths.append(checkpoint)
        if done.fit is not None:
            self.console.note(f"kept in {done.fit} (peel report, peel verify, peel graft)")
        if self.settings.discard_activations and done.activations is not None:
            with Lock(done.activations) as lock:
                if lock.take():
                    done.activations.unlink(missing_ok=True)  # another process may have been quicker
                else:
                    self.console.note(f"{done.activations}: kept, because another peel process works on it")

    def _is_there(self, earlier: Path) -> bool:
        if (earlier / "config.json").is_file():
            return True
        self.console.warn(f"{earlier}: was removed, so that rollback does not try its blocks")
        return False
