"""The commands from end to end, on a tiny checkpoint: what they print, what they leave, and that it holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
import transformers
from jsonschema import Draft202012Validator
from tiny import AUDIT, EXTRACT, FIT, Done, peel, save_ids, save_tiny

from peelcli.report.json_format import report_schema

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Audited:
    """A checkpoint, its token ids, and what an audit of it left and said."""

    ckpt: Path
    data: Path
    home: Path
    done: Done

    @property
    def command(self) -> tuple[Any, ...]:
        return ("audit", self.ckpt, "--data", self.data, *AUDIT, "-f", "json")

    @property
    def run(self) -> dict[str, Any]:
        return self.done.runs[0]

    @property
    def files(self) -> dict[str, Path]:
        """The activations and the fit, by the first word of their names."""
        return {path.name.split("-")[0]: path for path in (self.home / "peel").rglob("*.h5")}


def audited_of(base: Path, family: str, **overrides: Any) -> Audited:
    ckpt, data, home = (
        save_tiny(base / family, family, **overrides),
        save_ids(base / "ids.npy"),
        base / "home",
    )
    return Audited(ckpt, data, home, peel(home, "audit", ckpt, "--data", data, *AUDIT, "-f", "json"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """Weights far larger than at initialisation, so that every block does something."""
    return audited_of(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """A family whose matrices are stored (d_in, d_out)."""
    return audited_of(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """A network as it is before the first step: flagged whatever the figures are."""
    return audited_of(tmp_path_factory.mktemp("untrained"), "llama", initializer_range=0.02)


def test_an_audit_says_what_its_schema_promises(llama: Audited) -> None:
    report = json.loads(llama.done.out)
    Draft202012Validator(report_schema()).validate(report)
    assert llama.done.code == int(report["flagged"])
    assert [entry["layer"] for entry in llama.run["layers"]] == [1, 2, 3]
    assert llama.run["tokens"] == {"fit": 512, "select": 256, "eval": 512}
    kinds = {reference["kind"] for reference in llama.run["references"]}
    assert kinds >= {"identity", "direct", "span"}


def test_a_second_audit_does_no_work(llama: Audited) -> None:
    before = {path: path.stat().st_mtime_ns for path in llama.files.values()}
    again = peel(llama.home, *llama.command)
    assert (again.code, again.out) == (llama.done.code, llama.done.out)  # to the last byte, timing and all
    assert again.stages == set()
    assert {path: path.stat().st_mtime_ns for path in llama.files.values()} == before


def test_the_same_audit_anew_comes_to_the_same_figures(llama: Audited, tmp_path: Path) -> None:
    anew = peel(tmp_path, *llama.command, "-o", tmp_path / "work", "--overwrite")
    assert anew.stages >= {"extract", "fit", "score"}
    assert (anew.code, anew.runs) == (llama.done.code, llama.done.runs)
    over = peel(tmp_path, *llama.command, "-o", tmp_path / "work", "--overwrite")
    assert over.stages >= {"extract", "fit", "score"}
    assert over.runs == anew.runs
    other = peel(tmp_path, *llama.command, "-o", tmp_path / "work", "--seed", "1")
    assert other.stages >= {"extract", "fit", "score"}
    assert other.runs != anew.runs


def test_the_chain_of_commands_is_an_audit(untrained: Audited, tmp_path: Path) -> None:
    acts = peel(tmp_path, "extract", untrained.ckpt, "--data", untrained.data, *EXTRACT)
    assert (acts.code, acts.out.count("\n")) == (0, 1)
    fit = peel(tmp_path, "fit", acts.out.strip(), *FIT)
    assert (fit.code, fit.out.count("\n")) == (0, 1)
    report = peel(tmp_path, "report", fit.out.strip(), "-f", "json")
    assert (report.code, report.runs) == (1, untrained.done.runs)
    assert untrained.done.code == 1
    named = peel(tmp_path, "report", fit.out.strip(), "-f", "json", "-o", tmp_path / "report.json")
    assert (named.code, named.out) == (1, f"{tmp_path / 'report.json'}\n")
    assert (tmp_path / "report.json").read_text() == report.out
    for settings in [("--exit-zero",), ("--fail-on", "none")]:
        assert peel(tmp_path, "report", fit.out.strip(), *settings).code == 0


def test_a_network_of_random_weights_is_untrained_in_every_layer(untrained: Audited) -> None:
    assert untrained.done.code == 1
    assert untrained.run["network"]["flags"] == ["untrained"]
    assert untrained.run["flagged_layers"] == [1, 2, 3]
    table = peel(untrained.home, "audit", untrained.ckpt, "--data", untrained.data, *AUDIT)
    assert table.code == 1
    assert "untrained" in table.out


# -- verify ------------------------------------------------------------------------------------------------------------


def test_every_witness_of_a_fit_comes_back(llama: Audited) -> None:
    done = peel(llama.home, "verify", llama.files["fit"], llama.ckpt, "--layers", "1-3", "--threads", "1")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    decided = {entry["reference"]["key"] for entry in llama.run["layers"]}
    assert {line.split(": ")[1] for line in lines} == decided
    assert all(line.endswith("holds") for line in lines)


def test_a_fit_whose_losses_were_changed_does_not_come_back(llama: Audited, tmp_path: Path) -> None:
    forged = tmp_path / "forged.h5"
    shutil.copyfile(llama.files["fit"], forged)
    key = llama.run["layers"][1]["reference"]["key"]
    with h5py.File(forged, "r+") as file:
        file[f"references/{key}/nll_eval"][...] -= 0.2
        file[f"references/{key}/nll_select"][...] -= 0.2  # chosen before, chosen now
    done = peel(llama.home, "verify", forged, llama.ckpt, "--layers", "2", "--threads", "1")
    assert (done.code, done.out) == (1, "")
    assert "error: " in done.err
    for words in ("forged.h5", key, "did not reproduce", "Fit again"):
        assert words in done.err


# -- graft -------------------------------------------------------------------------------------------------------------

GRAFTS = [
    ("llama", "identity-001-attention"),
    ("llama", "identity-002-mlp"),
    ("llama", "identity-002-block"),
    ("llama", "identity-001to003-block"),
    ("llama", "direct-002-block-ternary"),
    ("llama", "direct-003-mlp-ternary"),
    ("llama", "span-001to002-block-ternary"),
    ("llama", "span-001to003-block-ternary"),
    ("llama", "challenge-002-block"),
    ("gpt2", "identity-001-block"),
    ("gpt2", "direct-001-attention-ternary"),
    ("gpt2", "direct-002-block-ternary"),
    ("gpt2", "span-002to003-block-ternary"),
]


@torch.no_grad()
def loss_of(directory: Path, ids: torch.Tensor) -> float:
    """Mean next-token loss as transformers itself has it."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    log_p = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].log_softmax(-1)
    return -float(log_p.gather(-1, ids[:, 1:, None]).double().mean())


@pytest.mark.parametrize(("family", "key"), GRAFTS)
def test_a_grafted_checkpoint_has_the_loss_that_was_reported(
    family: str, key: str, llama: Audited, gpt2: Audited, tmp_path: Path
) -> None:
    audited = llama if family == "llama" else gpt2
    before = {path.name: path.read_bytes() for path in audited.ckpt.iterdir()}
    layer = key.split("-")[1][:3]
    command = ("graft", audited.files["fit"], audited.ckpt, "--layer", int(layer), "--reference", key)
    done = peel(audited.home, *command, "-o", tmp_path / "new", "--threads", "1")
    assert (done.code, done.out) == (0, f"{tmp_path / 'new'}\n"), done.err
    (reference,) = [r for r in audited.run["references"] if r["key"] == key]
    with h5py.File(audited.files["fit"]) as file:
        ids = torch.from_numpy(file["ids_eval"][...]).long()
    reported = audited.run["network"]["ce"] - reference["gap"]
    assert abs(loss_of(tmp_path / "new", ids) - reported) < 1e-4
    assert abs(loss_of(audited.ckpt, ids) - audited.run["network"]["ce"]) < 1e-4
    assert {path.name: path.read_bytes() for path in audited.ckpt.iterdir()} == before


# -- what an audit leaves, and of several checkpoints ------------------------------------------------------------------


def test_a_dry_run_plans_and_does_nothing(llama: Audited, tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = peel(tmp_path, "audit", llama.ckpt, "--data", llama.data, *AUDIT, "--dry-run", "-o", work)
    assert done.code == 0
    assert "plan for" in done.out
    for word in ("layers", "memory", "disk", "time", "1,280 tokens"):
        assert word in done.out
    assert not list(work.rglob("*.h5*"))
    assert done.stages <= {"scan", "plan"}
    planned = re.search(r"disk +([\d.]+) MB at most", done.out)
    assert planned is not None
    assert float(planned[1]) * 1e6 > sum(path.stat().st_size for path in llama.files.values())


def test_discarded_activations_are_not_missed(llama: Audited, tmp_path: Path) -> None:
    done = peel(tmp_path, *llama.command, "--discard-activations")
    assert (done.code, done.runs) == (llama.done.code, llama.done.runs)
    assert [path.name.split("-")[0] for path in (tmp_path / "peel").rglob("*.h5")] == ["fit"]
    again = peel(tmp_path, *llama.command, "--discard-activations")
    assert (again.out, again.stages) == (done.out, set())


def test_checkpoints_side_by_side_and_two_that_are_the_same(
    llama: Audited, untrained: Audited, tmp_path: Path
) -> None:
    copy = shutil.copytree(llama.ckpt, tmp_path / "checkpoint-7")
    command = ("audit", llama.ckpt, untrained.ckpt, copy, "--data", llama.data, *AUDIT)
    done = peel(tmp_path, *command, "-f", "json", "-o", tmp_path / "work")
    assert done.code == 1
    runs = done.runs
    assert [run["checkpoint"] for run in runs] == [str(path) for path in (llama.ckpt, untrained.ckpt, copy)]
    assert runs[0] == llama.run
    assert [run["step"] for run in runs] == [None, None, 7]
    same = [[f["message"] for f in run["findings"] if f["kind"] == "identical-checkpoint"] for run in runs]
    assert same[:2] == [[], []]
    (message,) = same[2]
    assert str(llama.ckpt) in message
    assert str(copy) in message
    assert len(list((tmp_path / "work").iterdir())) == 3
    table = peel(tmp_path, *command, "-o", tmp_path / "work")
    assert (table.code, table.stages) == (1, set())
    assert "byte for byte" in " ".join(table.out.split())


def test_some_layers_alone(llama: Audited, tmp_path: Path) -> None:
    done = peel(tmp_path, *llama.command, "--layers", "2")
    (run,) = done.runs
    assert run["audited_layers"] == [2]
    assert {reference["layer"] for reference in run["references"]} == {2}
    whole = {r["key"]: r["gap"] for r in llama.run["references"] if r["kind"] == "identity"}
    alone = {r["key"]: r["gap"] for r in run["references"] if r["kind"] == "identity"}
    assert alone == pytest.approx({key: whole[key] for key in alone})
    assert alone


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["audit"], ["fit"], ["verify"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom peelcli.cli.main import run\n"
        f"code = run({[*command, '--help']})\n"
        "print([n for n in ('torch', 'transformers', 'h5py', 'accelerate', 'numpy') if n in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert "Usage" in done.stdout
