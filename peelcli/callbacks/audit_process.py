"""Run audits during a training, one at a time, each in a separate process at the lowest priority.

The training process spends nothing on an audit but to start it and to read a summary of its result. While one runs, the
newest checkpoint waits; one that waited and was overtaken is left out, and that is said.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peelcli.config import AuditConfig, ExtractConfig, FitConfig, ReportConfig, TrackConfig, resolve
from peelcli.config.setting import settings_of
from peelcli.records.printable import printable
from peelcli.runtime import durable
from peelcli.tracking.metrics import metrics_of

SECTIONS = (ExtractConfig, FitConfig, ReportConfig, TrackConfig, AuditConfig)
OURS = ("output", "format", "dry_run", "history")  # what a callback sets itself
LOWEST = 19  # niceness


@dataclass(frozen=True)
class Outcome:
    """The outcome of one checkpoint's audit. code: peel's exit code, 0, or 1 if something is flagged."""

    name: str
    code: int | None  # None: it was not run, or not to its end
    message: str  # in words, for a log
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    report: Path | None = None

    def __str__(self) -> str:
        return f"{printable(self.name)}: {printable(self.message)}"

    @property
    def is_clean(self) -> bool:
        """Whether the audit was completed and nothing is flagged."""
        return self.code == 0


@dataclass(frozen=True)
class _Job:
    checkpoint: Path
    step: int | None
    ours: bool  # a copy of our own, which goes once it is audited


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """The `peel audit` flags for the keyword `options`. Raises UsageError for an unknown setting."""
    given = {name: value for name, value in options.items() if value is not None}
    flags: list[str] = []
    resolve(SECTIONS, None, {}, {name: _text(value) for name, value in given.items()})
    rules = {name: rule for section in SECTIONS for name, rule in settings_of(section).items()}
    for name, value in given.items():
        if name in OURS:
            raise TypeError(f"{name}: the callback sets it itself; leave it out")
        if isinstance(value, bool):
            flags.append(rules[name].flag if value else f"--no-{rules[name].flag[2:]}")
        else:
            for item in value if isinstance(value, (list, tuple)) else [value]:
                flags += [rules[name].flag, str(item)]
    return flags


def _text(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return value if isinstance(value, bool) else str(value)


class AuditProcess:
    """Audits submitted checkpoints one after another, and keeps their reports in `directory`.

    There each leaves NAME.json, what it said in NAME.log, and a line in history.jsonl.
    """

    def __init__(self, directory: Path, options: Mapping[str, Any]) -> None:
        self.directory = directory
        self._flags = flags_of({"device": "cpu", "threads": 1, **options})
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._running: subprocess.Popen[bytes] | None = None
        self._outcomes: list[Outcome] = []
        self._closing, self._ended = False, False
        self._worker: threading.Thread | None = None

    def submit(
        self, checkpoint: Path, step: int | None = None, *, may_vanish: bool = False, ours: bool = False
    ) -> None:
        """Audit a checkpoint next; returns at once.

        may_vanish: the trainer may remove it before its turn has come, so that its files are held by links. ours: it
        is a copy made for the audit, to be removed after it.
        """
        job = _Job(checkpoint, step, ours)
        if may_vanish and (held := self._held(checkpoint)) is not None:
            job = _Job(held, step, True)
        with self._changed:
            if self._waiting is not None:
                self._drop(self._waiting, "a newer checkpoint was saved before its turn came; not audited")
            self._waiting = job
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="peel", daemon=True)
                self._worker.start()
                atexit.register(self.close, 0.0)
            self._changed.notify_all()

    def collect(self) -> list[Outcome]:
        """The outcomes since the last call."""
        if not self._outcomes:  # asked at every log of a training run: no lock where there is nothing
            return []
        with self._changed:
            found, self._outcomes = self._outcomes, []
            return found

    def close(self, timeout: float) -> list[Outcome]:
        """Wait up to `timeout` seconds for running and waiting audits, end the rest, and return the new outcomes."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._ended = True  # the training: from now on an audit takes nothing from it
            if self._running is not None:
                _set_urgent(self._running.pid, True)
            while self._is_busy and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._waiting is not None:
                self._drop(
                    self._waiting, f"not begun {timeout:g} s after the training had ended; not audited"
                )
                self._waiting = None
            self._closing = True
            self._changed.notify_all()
            running = self._running
        if running is not None:
            running.terminate()
        if self._worker is not None:
            self._worker.join(10)
            if self._worker.is_alive() and running is not None:
                running.kill()
                self._worker.join(10)
            atexit.unregister(self.close)
        return self.collect()

    @property
    def _is_busy(self) -> bool:
        return self._waiting is not None or self._running is not None

    def _drop(self, job: _Job, why: str) -> None:
        self._remove(job)
        self._outcomes.append(Outcome(job.checkpoint.name, None, why, job.step))

    # -- in the thread of its own --------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._closing:
                    self._changed.wait()
                if self._waiting is None:
                    return
                job, self._waiting = self._waiting, None
                try:
                    self._running = self._start(job)
                except OSError as error:
                    self._drop(job, f"the audit could not be started ({error})")
                    continue
                process = self._running
            code = process.wait()
            outcome = self._outcome(job, code)
            self._remove(job)
            with self._changed:
                self._running = None
                self._outcomes.append(outcome)
                self._changed.notify_all()

    def _start(self, job: _Job) -> subprocess.Popen[bytes]:
        self.directory.mkdir(parents=True, exist_ok=True)
        name = job.checkpoint.name
        command = [
            sys.executable,
            "-m",
            "peelcli",
            "audit",
            str(job.checkpoint),
            *self._flags,
            "--format",
            "json",
        ]
        command += ["--output", str(self.directory / "work" / name)]
        command += ["--history", str(self.directory / "history.jsonl")]
        with self._partial(name).open("wb") as out, (self.directory / f"{name}.log").open("wb") as err:
            # A session of its own: Ctrl-C in the terminal ends the training, which ends the audit in its own time.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        _set_urgent(process.pid, self._ended)
        return process

    def _partial(self, name: str) -> Path:
        return self.directory / f"{name}.json.partial"

    def _outcome(self, job: _Job, code: int) -> Outcome:
        name, log = job.checkpoint.name, self.directory / f"{job.checkpoint.name}.log"
        if self._closing and code not in (0, 1):
            self._partial(name).unlink(missing_ok=True)
            return Outcome(
                name, None, "not done in the time given to it after the training; not audited", job.step
            )
        if code not in (0, 1):
            self._partial(name).unlink(missing_ok=True)
            return Outcome(
                name, code if code >= 0 else None, f"could not be audited: {_last_error(log, code)}", job.step
            )
        report = self.directory / f"{name}.json"
        try:
            with self._partial(name).open("rb") as written:
                durable.sync(written.fileno())
            durable.take_name(self._partial(name), report)
            run = json.loads(report.read_text(encoding="utf-8"))["runs"][-1]
            flagged = run["flagged_layers"]
            message = f"layers {', '.join(map(str, flagged))} flagged" if flagged else "nothing flagged"
            if code and not flagged:
                message = "the network flagged"
            return Outcome(
                name, code, f"{message}; see {report}", run["step"] or job.step, metrics_of(run), report
            )
        except (OSError, ValueError, LookupError) as error:
            return Outcome(name, None, f"its report cannot be read ({error})", job.step)

    # -- checkpoints that the trainer may remove -----------------------------------------------------------------------

    def _held(self, checkpoint: Path) -> Path | None:
        """A directory of links to a checkpoint's files, under the same name; None if the disk supports no links."""
        held = self.directory / "held" / checkpoint.name
        try:
            shutil.rmtree(held, ignore_errors=True)
            held.mkdir(parents=True)
            for file in checkpoint.iterdir():
                if file.is_file() and not file.name.startswith(
                    ("optimizer", "scheduler", "rng_state", "scaler")
                ):
                    os.link(file, held / file.name)
            return held
        except OSError:
            shutil.rmtree(held, ignore_errors=True)
            return None

    def _remove(self, job: _Job) -> None:
        if job.ours:
            shutil.rmtree(job.checkpoint, ignore_errors=True)


def _set_urgent(pid: int, urgent: bool) -> None:
    """Set a process to normal priority, or to run only on idle processors, as far as the system allows it."""
    policy = getattr(os, "SCHED_OTHER" if urgent else "SCHED_IDLE", None)
    with contextlib.suppress(OSError):  # it may have ended meanwhile
        if (
            policy is None
        ):  # not Linux: it stays at the lowest priority, from which only the system's owner lifts it
            if not urgent and hasattr(os, "setpriority"):
                os.setpriority(os.PRIO_PROCESS, pid, LOWEST)
            return
        for thread in os.listdir(f"/proc/{pid}/task"):  # those to come inherit it
            os.sched_setscheduler(int(thread), policy, os.sched_param(0))


def _last_error(log: Path, code: int) -> str:
    """The last error message in the audit's log."""
    if code < 0:
        return f"ended by signal {-code}"
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{told[-1] if told else f'exit code {code}'} (see {log})"


def warn_of(outcomes: list[Outcome]) -> None:
    """Emit warnings for flagged layers and failed audits, in the calling thread."""
    for outcome in outcomes:
        if not outcome.is_clean:
            warnings.warn(f"peel: {outcome}", RuntimeWarning, stacklevel=3)
