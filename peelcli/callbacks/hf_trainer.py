"""A callback for `transformers.Trainer`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peelcli.callbacks.audit_process import AuditProcess, Outcome, warn_of

logger = logging.getLogger("peelcli")


class PeelCallback(TrainerCallback):
    """Audits every checkpoint that a Trainer saves, in a separate process that uses idle processor time.

        trainer = Trainer(..., callbacks=[PeelCallback(data="text.txt", tokens=40_000)])

    Keyword arguments are the settings of `peel audit`; unless they say otherwise an audit has one thread, on the CPU.
    Reports go to `directory`, by default `peel` in the Trainer's output directory. What is flagged and what could not
    be audited is told as a RuntimeWarning when the Trainer next logs or saves; the figures go to the Trainer's
    `state.log_history`, too. When training ends, `wait` seconds are given to the audits that are not done. Raises
    UsageError for what is no setting.
    """

    def __init__(self, *, directory: str | Path | None = None, wait: float = 600.0, **settings: Any) -> None:
        self.directory = None if directory is None else Path(directory)
        self.wait = wait
        self.outcomes: list[Outcome] = []
        self._settings = settings
        self._audits = AuditProcess(
            self.directory or Path(), settings
        )  # here, to refuse a wrong setting at once

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a new audit process with its directory for reports."""
        directory = self.directory or Path(args.output_dir or ".") / "peel"
        self._audits = AuditProcess(directory, self._settings)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Submit the checkpoint that was just saved."""
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            self._audits.submit(checkpoint, state.global_step, may_vanish=args.save_total_limit is not None)
        self._tell(state, self._audits.collect())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the audits that have ended."""
        self._tell(state, self._audits.collect())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for unfinished audits."""
        self._tell(state, self._audits.close(self.wait))

    def _tell(self, state: TrainerState, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            logger.info("%s", outcome)
            if outcome.metrics:
                state.log_history.append({**outcome.metrics, "step": outcome.step or 0})
        self.outcomes += outcomes
        warn_of(outcomes)
