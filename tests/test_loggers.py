"""What is logged can be read back by each library's own means; nothing leaves the machine."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from report.hand_made import RESULT

from peelcli.errors import UsageError
from peelcli.report.json_format import render_json
from peelcli.tracking.history import entry_of
from peelcli.tracking.loggers import log_to
from peelcli.tracking.metrics import metrics_of


def results(tmp_path: Path) -> list[Any]:
    """Two checkpoints of one run."""
    return [
        replace(RESULT, run=replace(RESULT.run, checkpoint=str(tmp_path / "run" / f"checkpoint-{n}"), step=n))
        for n in (100, 200)
    ]


def test_the_figures_are_those_of_the_report_and_of_a_history() -> None:
    (run,) = json.loads(render_json([RESULT]))["runs"]
    figures = metrics_of(run)
    assert figures == metrics_of(asdict(entry_of(RESULT)))
    assert figures["peel/flagged"] == 3
    assert figures["peel/ce"] == 1.86
    assert figures["peel/layer_003/gap"] == 0.01
    assert figures["peel/layer_003/flagged"] == 1
    assert "peel/layer_005/gap" not in figures  # broken: it has none


def test_tensorboard_draws_a_curve_a_figure_over_all_nights(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for result in results(tmp_path):  # two nights, two processes, one curve
        log_to(f"tensorboard:{tmp_path / 'tb'}", [result])
    found = EventAccumulator(str(tmp_path / "tb")).Reload()
    for name, value in metrics_of(asdict(entry_of(RESULT))).items():
        events = found.Scalars(name)
        assert [event.step for event in events] == [100, 200]
        assert events[0].value == pytest.approx(value)
    texts = found.Tensors("peel/layer_003/reason/text_summary")
    assert b"dropping its attention" in texts[0].tensor_proto.string_val[0]


def test_mlflow_keeps_all_nights_of_a_run_in_one_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    for result in results(tmp_path):
        log_to(f"mlflow:{uri}", [result])
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("peel")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "peel run")
    assert run.data.tags["peel.flagged_layers"] == "2, 3, 5"
    history = client.get_metric_history(run.info.run_id, "peel/layer_003/score")
    assert [(m.step, m.value) for m in history] == [(100, 0.01), (200, 0.01)]
    assert set(run.data.metrics) == set(metrics_of(asdict(entry_of(RESULT))))


WANDB = """
import sys
from pathlib import Path
from test_loggers import results
from peelcli.tracking.loggers import log_to
log_to("wandb:nightly", results(Path(sys.argv[1])))
"""


def test_wandb_offline_writes_its_run_and_nothing_to_stdout(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    env = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_CACHE_DIR": str(tmp_path / "c"),
    }
    here = Path(__file__).parent
    env["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    (file,) = tmp_path.rglob("run-*.wandb")
    content = file.read_bytes()
    for name in (b"peel/ce", b"peel/layer_003/score", b"peel/flagged_layers", b"nightly", b"peel run"):
        assert name in content


def test_a_target_that_is_none_and_a_library_that_is_not_there_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for target in ("comet:x", "wandb", "wandb:"):
        with pytest.raises(UsageError, match="expected tensorboard:DIR"):
            log_to(target, [RESULT])
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("peelcli.tracking.loggers.import_module", without)
    with pytest.raises(UsageError, match=r"pip install 'peelcli\[wandb\]'"):
        log_to("wandb:x", [RESULT])
