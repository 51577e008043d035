"""What may have been misread is in the report of every format, and changes no exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny import AUDIT, SEQ_LEN, Done, peel, save_ids, save_tiny

SETTINGS = (*AUDIT, "--references", "identity", "--paths", "none")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint; and one with the same weights, a tensor too many, and an adapter beside it."""
    base = tmp_path_factory.mktemp("findings")
    sound = save_tiny(base / "sound")
    noted = Path(shutil.copytree(sound, base / "noted"))
    tensors = load_file(noted / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.extra"] = tensors["model.norm.weight"].clone()
    save_file(tensors, noted / "model.safetensors", metadata={"format": "pt"})
    (noted / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    ids = np.load(save_ids(base / "ids.npy", rows=60))
    ids = np.concatenate([ids, np.zeros_like(ids)], axis=1)
    np.save(base / "padded.npy", ids)
    return base


def audited(base: Path, name: str, data: str, *more: object) -> Done:
    return peel(base / "cache", "audit", base / name, "--data", base / data, *SETTINGS, *more)


@pytest.fixture(scope="module")
def noted(base: Path) -> Done:
    return audited(base, "noted", "padded.npy", "-f", "json")


def test_findings_stand_in_json_and_leave_verdicts_and_the_exit_code(base: Path, noted: Done) -> None:
    sound = audited(base, "sound", "padded.npy", "-f", "json")
    assert noted.code == sound.code
    (run,), (same,) = noted.runs, sound.runs
    assert [f["kind"] for f in run["findings"]] == ["padding", "unused-tensors", "adapter"]
    assert [f["kind"] for f in same["findings"]] == ["padding"]
    messages = {f["kind"]: f["message"] for f in run["findings"]}
    assert f"of the {60 * 2 * SEQ_LEN:,} token ids in padded.npy are padding" in messages["padding"]
    assert "1 tensor in the files took no part" in messages["unused-tensors"]
    assert "'model.layers.1.self_attn.q_proj.extra'" in messages["unused-tensors"]
    assert run["layers"] == same["layers"], "the adapter and the tensor took no part"


FORMATS = ("table", "markdown", "html", "csv", "junit", "github", "sarif")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_shows_every_finding(format: str, base: Path, noted: Done) -> None:
    fit = next((base / "cache").rglob("noted-*/fit-*.h5"))
    out = " ".join(peel(base / "cache", "report", fit, "-f", format).out.replace("\\", "").split())
    for word in ("padding", "unused-tensors", "adapter_config.json"):
        assert word in out.replace("&#95;", "_")


def test_what_lies_beside_a_checkpoint_is_looked_at_anew_where_the_fit_is_kept(
    base: Path, noted: Done
) -> None:
    (base / "noted" / "adapter_config.json").unlink()
    (base / "noted" / "consolidated.00.pth").write_bytes(b"x")
    again = audited(base, "noted", "padded.npy", "-f", "json")
    assert "fit" not in again.stages
    assert [f["kind"] for f in again.runs[0]["findings"]] == ["padding", "unused-tensors", "other-weights"]


def test_an_extraction_alone_warns_of_what_lies_beside(base: Path, tmp_path: Path) -> None:
    beside = Path(shutil.copytree(base / "sound", tmp_path / "beside"))
    (beside / "consolidated.00.pth").write_bytes(b"x")
    budget = ("--seq-len", "16", "--fit-tokens", "128", "--select-tokens", "128", "--eval-tokens", "256")
    done = peel(
        tmp_path, "extract", beside, "--data", base / "padded.npy", *budget, "-o", tmp_path / "acts.h5"
    )
    assert done.code == 0
    assert "warning: " in done.err
    assert "consolidated.00.pth" in done.err
