"""A callback for Lightning. Its checkpoints hold only a state dict, so the model is saved again for the audit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peelcli.callbacks.audit_process import AuditProcess, Outcome, warn_of

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback  # type: ignore[assignment]


class PeelLightningCallback(Callback):
    """Audits the model whenever Lightning saves a checkpoint, in a separate process.

        Trainer(..., callbacks=[ModelCheckpoint(...), PeelLightningCallback(data="text.txt", tokenizer=tokenizer)])

    `model_of` finds the transformers model in the LightningModule, its `model` unless said otherwise; `tokenizer` is
    saved with it, where the data are text. The rest is as in `PeelCallback`; the figures go to the trainer's loggers.
    """

    def __init__(
        self,
        *,
        directory: str | Path | None = None,
        wait: float = 600.0,
        model_of: Callable[[Any], Any] = lambda module: module.model,
        tokenizer: Any = None,
        **settings: Any,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.wait, self.model_of, self.tokenizer = wait, model_of, tokenizer
        self.outcomes: list[Outcome] = []
        self._settings = settings
        self._audits = AuditProcess(
            self.directory or Path(), settings
        )  # here, to refuse a wrong setting at once

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start a new audit process with its directory for reports."""
        self._home = self.directory or Path(trainer.default_root_dir) / "peel"
        self._audits = AuditProcess(self._home, self._settings)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the model with save_pretrained, and submit it."""
        if trainer.is_global_zero:
            copy = self._home / "held" / f"step-{trainer.global_step}"
            self.model_of(pl_module).save_pretrained(copy)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(copy)
            self._audits.submit(copy, trainer.global_step, ours=True)
        self._tell(trainer, self._audits.collect())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the audits that have ended."""
        self._tell(trainer, self._audits.collect())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for unfinished audits."""
        self._tell(trainer, self._audits.close(self.wait))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the audits when the training fails."""
        self._tell(trainer, self._audits.close(0.0))

    def _tell(self, trainer: Any, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            for logger in trainer.loggers if outcome.metrics else ():
                logger.log_metrics(dict(outcome.metrics), step=outcome.step)
        self.outcomes += outcomes
        warn_of(outcomes)
