"""A Trainer's checkpoints are audited beside the training, which waits for nothing until it has ended."""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from peelcli.callbacks import PeelCallback
from peelcli.callbacks.audit_process import AuditProcess, flags_of
from peelcli.errors import UsageError

HEALTHY = Path(__file__).parents[1] / "peelcli" / "demo" / "healthy"
QUICK: dict[str, Any] = {
    "fit_tokens": 128, "select_tokens": 256, "eval_tokens": 512, "seq_len": 32, "references": ["identity"],
    "paths": "none",
}  # fmt: skip


def test_settings_become_the_flags_of_peel_audit() -> None:
    assert flags_of({"data": ["a.txt", "b.txt"], "fail_on": "broken", "ladder": False, "resume": True}) == [
        "--data", "a.txt", "--data", "b.txt", "--fail-on", "broken", "--no-ladder", "--resume",
    ]  # fmt: skip
    assert flags_of({"layers": None}) == []
    for wrong in ({"tokns": 5}, {"scheme": "septenary"}, {"eval_tokens": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", "-")):
            PeelCallback(**wrong)
    with pytest.raises(TypeError, match="output"):
        PeelCallback(output="x")


def train(tmp_path: Path, callback: PeelCallback, **settings: Any) -> transformers.Trainer:
    """Four steps of a small model, a checkpoint after the second and the fourth."""
    model = transformers.AutoModelForCausalLM.from_pretrained(HEALTHY, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(HEALTHY)
    ids = torch.randint(0, 640, (16, 16), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
        report_to="none", disable_tqdm=True, use_cpu=True, learning_rate=1e-5, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[callback],
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
    )
    trainer.train()
    return trainer


def test_every_checkpoint_of_a_trainer_is_audited_or_said_not_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="peelcli")
    callback = PeelCallback(**QUICK, wait=500)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        trainer = train(tmp_path, callback, save_total_limit=1)  # the first is removed while it is audited
    home = tmp_path / "run" / "peel"
    assert [outcome.name for outcome in callback.outcomes] == ["checkpoint-2", "checkpoint-4"]
    for outcome in callback.outcomes:
        assert outcome.code in (0, 1), outcome.message
        (run,) = json.loads((home / f"{outcome.name}.json").read_text())["runs"]
        assert (run["step"], outcome.step) == (outcome.step, run["step"])
        assert f"{outcome.name}: {outcome.message}" in caplog.text
        logged = [
            entry
            for entry in trainer.state.log_history
            if "peel/ce" in entry and entry["step"] == run["step"]
        ]
        assert [entry["peel/ce"] for entry in logged] == [run["network"]["ce"]]
        assert logged[0]["peel/layer_003/score"] == run["layers"][2]["score"]
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    assert not list((home / "held").iterdir())
    assert (home / "history.jsonl").read_text().count("\n") == 2


def test_what_fails_is_a_warning_and_not_the_end_of_the_training(tmp_path: Path) -> None:
    callback = PeelCallback(**QUICK, data=str(tmp_path / "absent.txt"), wait=500)
    with pytest.warns(
        RuntimeWarning, match=r"peel: checkpoint-\d: could not be audited: .*absent\.txt: No such file"
    ):
        trainer = train(tmp_path, callback)
    assert trainer.state.global_step == 4
    assert {outcome.code for outcome in callback.outcomes} <= {3, None}


def test_only_the_newest_waits_and_what_is_not_done_in_time_is_said(tmp_path: Path) -> None:
    audits = AuditProcess(tmp_path / "peel", QUICK)
    names = [f"checkpoint-{n}" for n in range(4)]
    for name in names:
        shutil.copytree(HEALTHY, tmp_path / name)
    began = time.monotonic()
    audits.submit(tmp_path / names[0])
    while audits._running is None:  # until it has been taken up
        time.sleep(0.01)
    for name in names[1:]:
        audits.submit(tmp_path / name)
    assert time.monotonic() - began < 5
    found = {outcome.name: outcome.message for outcome in audits.collect() + audits.close(0.0)}
    assert time.monotonic() - began < 30
    assert [name for name in names if "a newer checkpoint was saved" in found[name]] == names[1:3]
    assert "not begun 0 s after the training had ended" in found[names[3]]
    assert "not done in the time given to it" in found[names[0]]
    assert not list((tmp_path / "peel").glob("*.partial"))


def test_lightning_checkpoints_are_audited_as_transformers_saves_the_model(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from peelcli.callbacks import PeelLightningCallback

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.AutoModelForCausalLM.from_pretrained(HEALTHY, dtype=torch.float32)

        def training_step(self, batch: Any) -> Any:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    ids = torch.randint(0, 640, (4, 16), generator=torch.Generator().manual_seed(0))
    tokenizer = transformers.AutoTokenizer.from_pretrained(HEALTHY)
    callback = PeelLightningCallback(**QUICK, tokenizer=tokenizer, wait=500)
    saver = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved")
    log = lightning.loggers.CSVLogger(tmp_path / "log")
    trainer = lightning.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", callbacks=[callback, saver], logger=log,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(ids, batch_size=2))
    outcome = callback.outcomes[-1]
    assert outcome.code in (0, 1), outcome.message
    assert (outcome.name, outcome.step) == ("step-2", 2)
    assert (tmp_path / "peel" / "step-2.json").is_file()
    assert not list((tmp_path / "peel" / "held").iterdir())
    assert (
        any("peel/ce" in metrics for metrics in log.experiment.metrics)
        or "peel/ce" in next((tmp_path / "log").rglob("metrics.csv")).read_text()
    )
