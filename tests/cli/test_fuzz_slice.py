"""A few damaged inputs of every kind; `tests/bench/fuzz.py` runs thousands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the fuzzer forks")
def test_damaged_input_of_every_kind_ends_in_a_result_or_in_words() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "bench" / "fuzz.py"), "--inputs", "40"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
