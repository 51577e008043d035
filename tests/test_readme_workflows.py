"""The README's workflows, line by line: the YAML is what its readers expect, and the shell does what is promised."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HEALTHY, STUCK = (ROOT / "peelcli" / "demo" / name for name in ("healthy", "stuck"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICK = {
    "PEEL_FIT_TOKENS": "256", "PEEL_SELECT_TOKENS": "1024", "PEEL_EVAL_TOKENS": "2048", "PEEL_SEQ_LEN": "64",
    "PEEL_REFERENCES": "identity", "PEEL_PATHS": "none", "PEEL_DIRECT_STEPS": "1", "PEEL_LADDER": "no",
    "PEEL_THREADS": "1",
}  # fmt: skip


def block(name: str) -> str:
    """The fenced block that follows the comment `test:NAME`."""
    found = re.search(rf"<!-- test:{name} -->\n```\w+\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert found, f"README.md has no block after <!-- test:{name} -->"
    return found[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the blocks share, and a baseline of the healthy checkpoint."""
    home = tmp_path_factory.mktemp("home")
    (home / "bin").mkdir()
    for name, text in {
        "mail": 'echo "mail $*" >> mail.txt; cat >> mail.txt',
        "sbatch": 'bash -c "${@: -1}"',
    }.items():
        script = home / "bin" / name
        script.write_text(f"#!/usr/bin/env bash\n{text}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    done = bash(f"peel audit {HEALTHY} --write-baseline {home / 'baseline.json'} -q > /dev/null", home, home)
    assert done.returncode == 0, done.stderr
    return home


def bash(script: str, home: Path, where: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a block as a shell would that stops at the first failure."""
    path = os.pathsep.join([str(home / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    full = {**os.environ, **QUICK, "PATH": path, "XDG_CACHE_HOME": str(home), **env}
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], cwd=where, env=full, capture_output=True, text=True, check=False,
        timeout=500,
    )  # fmt: skip


def place(home: Path, tmp_path: Path) -> Path:
    shutil.copyfile(home / "baseline.json", tmp_path / "baseline.json")
    return tmp_path


@pytest.mark.parametrize(("checkpoint", "code"), [(HEALTHY, 0), (STUCK, 1)])
def test_github_actions(checkpoint: Path, code: int, home: Path, tmp_path: Path) -> None:
    job = yaml.safe_load(block("github"))
    assert job[True] == {"schedule": [{"cron": "0 5 * * *"}]}  # YAML reads the key `on` so
    (steps,) = (each["steps"] for each in job["jobs"].values())
    summary = tmp_path / "summary.md"
    env = {"CHECKPOINT": str(checkpoint), "GITHUB_STEP_SUMMARY": str(summary)}
    *first, last = (bash(step["run"], home, place(home, tmp_path), **env) for step in steps)
    assert [done.returncode for done in first] == [0]
    assert last.returncode == code, last.stderr
    assert ("layer 3" in last.stdout) == bool(code)
    assert checkpoint.name in summary.read_text()
    assert (tmp_path / "history.jsonl").read_text().count("\n") == 1


def test_gitlab_ci(home: Path, tmp_path: Path) -> None:
    job = yaml.safe_load(block("gitlab"))["audit"]
    (command,) = job["script"]
    done = bash(command, home, place(home, tmp_path), CHECKPOINT=str(STUCK))
    assert done.returncode == 1
    assert job["artifacts"]["when"] == "always"  # else the report of a failure is lost
    text = (tmp_path / job["artifacts"]["reports"]["junit"]).read_text()
    assert "<failure" in text


def test_cron_mails_what_is_flagged(home: Path, tmp_path: Path) -> None:
    minute, hour, *days, command = block("cron").strip().split(maxsplit=5)
    assert (minute, hour, days) == ("0", "5", ["*", "*", "*"])
    command = command.replace("/srv/run", str(place(home, tmp_path)))
    (tmp_path / "latest").symlink_to(STUCK)
    done = bash(command, home, tmp_path)
    assert done.returncode == 0, done.stderr
    mail = (tmp_path / "mail.txt").read_text()
    assert mail.startswith("mail -s peel: exit 1 team")
    assert "layer 3" in mail


def test_slurm_wraps_a_command_that_is_one(home: Path, tmp_path: Path) -> None:
    place(home, tmp_path)
    shutil.copytree(HEALTHY, tmp_path / "run" / "checkpoint-1")
    done = bash(block("slurm"), home, tmp_path, TRAIN_JOB="7")
    assert done.returncode == 0, done.stderr
    assert "checkpoint-1" in (tmp_path / "audit.txt").read_text()


def test_the_recipe_chains_the_commands(home: Path, tmp_path: Path) -> None:
    done = bash(block("recipe"), home, tmp_path, CHECKPOINT=str(STUCK))
    assert (done.returncode, done.stdout) == (0, "flagged: [3]\n"), done.stderr
    failed = bash(block("recipe"), home, tmp_path, CHECKPOINT=str(tmp_path / "absent"))
    assert (failed.returncode, failed.stdout) == (3, "")


def test_the_callback_is_python_that_takes_its_settings() -> None:
    tree = ast.parse(block("callback"))
    from peelcli.callbacks import PeelCallback

    call = next(
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "PeelCallback"
    )
    PeelCallback(**{word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg})
