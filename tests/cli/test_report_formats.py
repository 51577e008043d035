"""Every format from the command line: to a file, into a closed pipe, onto a full disk, in a shell script."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import AUDIT, leftovers, peel, peel_apart, save_ids, save_tiny

from peelcli.config import FORMATS
from peelcli.report import html

ROOT = Path(__file__).parents[2]
WRITABLE = [name for name in FORMATS if name != "html" or html.find_spec("plotly")]


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fit of a network of random weights, in which every layer is flagged."""
    base = tmp_path_factory.mktemp("formats")
    ckpt, ids = save_tiny(base / "ckpt=1,<b>%0A", initializer_range=0.02), save_ids(base / "ids.npy")
    done = peel(base, "audit", ckpt, "--data", ids, *AUDIT, "--paths", "none", "--references", "identity")
    assert done.code == 1, done.err
    return next((base / "peel").rglob("fit-*.h5"))


@pytest.mark.parametrize("format", WRITABLE)
def test_a_file_holds_what_stdout_would(format: str, fit: Path, tmp_path: Path) -> None:
    out = peel(tmp_path, "report", fit, "-f", format)
    assert out.code == 1, out.err
    named = peel(tmp_path, "report", fit, "-f", format, "-o", tmp_path / "report")
    assert (named.code, named.out) == (1, f"{tmp_path / 'report'}\n")
    written = (tmp_path / "report").read_text(encoding="utf-8")
    assert written == out.out if format != "junit" else len(written) == len(out.out)  # it bears the time
    for layer in ("1", "2", "3"):
        assert layer in written
    assert "untrained" in written
    assert peel(tmp_path, "report", fit, "-f", format, "--exit-zero").code == 0


@pytest.mark.parametrize("format", WRITABLE)
def test_a_full_disk_leaves_no_half_a_report(format: str, fit: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "report"
    output.write_text("the last one")
    command = ("report", fit, "-f", format, "-o", output)
    done = peel_apart(tmp_path / "home", *command, largest_file=500)
    assert (done.code, done.out) == (3, "")
    assert f"{output}: cannot be written (File too large); name another --output" in done.err
    assert output.read_text() == "the last one"
    assert os.listdir(tmp_path / "out") == ["report"]
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("format", WRITABLE)
def test_a_closed_pipe_keeps_the_exit_code(format: str, fit: Path, tmp_path: Path) -> None:
    done = peel_apart(tmp_path / "home", "report", fit, "-f", format, closed_pipe=True)
    assert (done.code, done.out) == (1, "")
    assert "Traceback" not in done.err
    assert "BrokenPipe" not in done.err


def test_a_page_without_its_library_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    for command in (("audit", tmp_path / "no-such"), ("report", tmp_path / "no-such.h5"), ("demo",)):
        done = peel(tmp_path, *command, "-f", "html")
        assert (done.code, done.out) == (2, "")
        assert "pip install 'peelcli[html]'" in done.err


SCRIPT = """
set -euo pipefail
code=0
peel report "$2" -f github > "$1/annotations" || code=$?
echo "first: $code"
peel report "$2" -f html --exit-zero | head -c 10 > "$1/begins"
path=$(peel report "$2" -f markdown -o "$1/summary.md")
echo "not reached, for layers are flagged"
"""


@pytest.mark.skipif("html" not in WRITABLE, reason="plotly is not installed")
def test_a_shell_script_chains_them(fit: Path, tmp_path: Path) -> None:
    command = tmp_path / "bin" / "peel"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m peelcli "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    env = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    done = subprocess.run(
        ["bash", "-c", SCRIPT, "script", tmp_path, fit], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "first: 1\n"
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "annotations").read_text().startswith("::error title=peel%3A network untrained::")
    assert (tmp_path / "summary.md").read_text().startswith("## peel: ")
    assert (tmp_path / "begins").read_text() == "<!DOCTYPE "


def test_a_layer_is_explained(fit: Path, tmp_path: Path) -> None:
    done = peel(tmp_path, "explain", "2", fit)
    assert done.code == 0, done.err
    assert "Layer 2 of " in done.out
    assert "What was tried\nreference" in done.out
    assert "identity attn" in done.out
    assert json.loads(peel(tmp_path, "explain", "2", fit, fit, "-f", "json").out)["layer"]["layer"] == 2
    for wrong, words in (("9", "only layers 1-3"), ("x", "Invalid value")):
        done = peel(tmp_path, "explain", wrong, fit)
        assert (done.code, done.out) == (2, "")
        assert words in done.err
