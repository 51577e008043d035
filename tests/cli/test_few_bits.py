"""Checkpoints that run in few bits, through the commands as a user calls them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import AUDIT, Done, peel, save_ids, save_tiny
from transformers import AutoModelForCausalLM

from peelcli.storage.fit_reader import read_fit
from peelcli.storage.parts import load_weights
from peelcli.storage.path_parts import load_path

TERNARY = math.log2(3)
BRIEF = ("--references", "identity,direct,challenge", "--paths", "none")
SCHEME = ("--trained-scheme", "ternary", "--trained-granularity", "channel")


def round_weights(source: Path, target: Path, family: str = "llama") -> Path:
    """A copy whose matrices are ternary already, one step a channel, mean |w|: rounded here, not by peel."""
    model = AutoModelForCausalLM.from_pretrained(source)
    for name, value in model.named_parameters():
        if value.ndim == 2 and (".layers." in name or ".h." in name):
            dim = 0 if family == "gpt2" else 1
            scale = value.detach().abs().mean(dim, keepdim=True)
            value.data = (value.detach() / scale).round().clamp(-1, 1) * scale
    model.save_pretrained(target)
    return target


def audit(tmp_path: Path, checkpoint: Path, *more: object) -> Done:
    ids = tmp_path / "ids.npy"
    if not ids.exists():
        save_ids(ids)
    return peel(
        tmp_path / "home", "audit", checkpoint, "--data", ids, *AUDIT, "-f", "json", "--exit-zero", *more
    )


def figures(run: dict[str, Any]) -> dict[str, Any]:
    """What was measured, without what names the checkpoint."""
    kept = {"network", "layers", "references", "paths"}
    return {key: value for key, value in run.items() if key in kept}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_latents_are_audited_as_the_weights_they_are_rounded_to(tmp_path: Path, family: str) -> None:
    latents = save_tiny(tmp_path / "latents", family)
    rounded = round_weights(latents, tmp_path / "rounded", family)
    of_latents = audit(tmp_path, latents, *SCHEME, *BRIEF)
    of_rounded = audit(tmp_path, rounded, *BRIEF)
    assert (of_latents.code, of_rounded.code) == (0, 0), of_latents.err + of_rounded.err
    (ours,), (theirs,) = of_latents.runs, of_rounded.runs
    assert ours["network"]["ce"] == pytest.approx(theirs["network"]["ce"], abs=1e-5)
    for mine, its in zip(ours["references"], theirs["references"], strict=True):
        assert mine["key"] == its["key"]
        assert mine["gap"] == pytest.approx(its["gap"], abs=2e-3)
    assert {layer["own_bits"] for layer in ours["layers"]} == {TERNARY}
    assert ours["quantized"]["method"] == "trained_scheme"
    assert theirs["quantized"] is None
    (first, *_) = ours["quantized"]["modules"]
    assert (first["scheme"], first["granularity"], first["layer"]) == ("ternary", "channel", 1)
    assert 0.2 < first["zeros"] < 0.5
    assert 0.1 < first["clipped"] < 0.4


def test_the_scheme_can_stand_in_a_file_and_shows_in_the_table(tmp_path: Path) -> None:
    latents = save_tiny(tmp_path / "latents")
    config = tmp_path / "c.yaml"
    config.write_text(
        "trained-scheme:\n  scheme: int4\n  granularity: group\n  group-size: 8\n  scale: absmax\n"
        "  modules: ['*.mlp.*']\n  activation-bits: 8\n"
    )
    done = audit(tmp_path, latents, "-c", config, *BRIEF)
    (run,) = done.runs
    modules = run["quantized"]["modules"]
    assert {m["name"].split(".")[-1] for m in modules} == {"gate_proj", "up_proj", "down_proj"}
    assert {(m["scheme"], m["group_size"]) for m in modules} == {("int4", 8)}
    assert run["quantized"]["activation_bits"] == 8
    assert run["config"]["trained_scheme"]["scheme"] == "int4"
    shown = audit(tmp_path, latents, "-c", config, *BRIEF, "-f", "table")
    assert "9 matrices in int4, one step for 8 weights" in " ".join(shown.out.split())
    assert "extract" not in shown.stages  # the second audit found the work of the first


def test_verify_and_graft_know_how_the_weights_were_trained(tmp_path: Path) -> None:
    latents = save_tiny(tmp_path / "latents")
    audit(tmp_path, latents, *SCHEME, *BRIEF)
    (fit,) = (tmp_path / "home").rglob("fit-*.h5")
    verified = peel(tmp_path / "home", "verify", fit, latents, "--layers", "1-3")
    assert verified.code == 0, verified.err
    assert verified.out.count("holds") == 3
    grafted = peel(
        tmp_path / "home", "graft", fit, latents, "--layer", "2", "-o", tmp_path / "g",
        "--reference", "identity-002-mlp",
    )  # fmt: skip
    assert grafted.code == 0, grafted.err
    assert "as plain float32 numbers" in grafted.err
    written = load_file(tmp_path / "g" / "model.safetensors")
    as_rounded = load_file(round_weights(latents, tmp_path / "rounded") / "model.safetensors")
    assert not written["model.layers.1.mlp.up_proj.weight"].any()
    torch.testing.assert_close(
        written["model.layers.0.mlp.up_proj.weight"], as_rounded["model.layers.0.mlp.up_proj.weight"]
    )


def pack_bitnet(directory: Path) -> None:
    from transformers.integrations.bitnet import pack_weights

    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(directory / "model.safetensors").items():
        if ".layers." in name and value.ndim == 2:
            scale = value.abs().mean()
            tensors[name] = pack_weights((value / scale).round().clamp(-1, 1))
            tensors[f"{name}_scale"] = (1 / scale).reshape(1)
        else:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))


def test_a_packed_series_with_rollback_verify_and_graft(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        pack_bitnet(save_tiny(run / f"checkpoint-{step}", seed=step))
    done = audit(tmp_path, run)
    assert done.code == 0, done.err
    first, second = done.runs
    assert {r["kind"] for r in second["references"]} >= {"rollback", "challenge", "direct", "identity"}
    for one in (first, second):
        assert {layer["own_bits"] for layer in one["layers"]} == {TERNARY}
        assert one["quantized"]["activation_bits"] == 8
        assert not one["findings"]
    fit = next(path for path in (tmp_path / "home").rglob("fit-*.h5") if "checkpoint-2" in str(path))
    verified = peel(tmp_path / "home", "verify", fit, run / "checkpoint-2", "--layers", "1-3", "--paths")
    assert verified.code == 0, verified.err
    grafted = peel(
        tmp_path / "home", "graft", fit, run / "checkpoint-2", "--layer", "3", "-o", tmp_path / "g",
    )  # fmt: skip
    assert grafted.code == 0, grafted.err
    assert "inputs are no longer rounded" in grafted.err
    assert "quantization_config" not in json.loads((tmp_path / "g" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "g")


@pytest.mark.parametrize("shared", ["tensor", "channel"])
def test_references_have_no_more_steps_than_the_checkpoint(tmp_path: Path, shared: str) -> None:
    """BitNet has one a matrix; with one a channel a reference of the same bits would be richer than the layer."""
    latents = save_tiny(tmp_path / "latents")
    options = ("--trained-scheme", "ternary", "--trained-granularity", shared)
    done = audit(tmp_path, latents, *options, *BRIEF[:-1], "direct")
    assert done.code == 0, done.err
    (fit,) = (tmp_path / "home").rglob("fit-*.h5")
    run = read_fit(fit)
    assert run.granularity == shared
    fitted = [s.reference for s in run.scores if s.reference.kind in ("direct", "challenge")]
    witnesses = [load_weights(fit, reference) for reference in fitted]
    witnesses += load_path(fit, range(1, run.num_layers + 1))[0]
    assert {m.spec.granularity for w in witnesses for m in w.quantized.values()} == {shared}
    assert {reference.kind for reference in fitted} == {"direct", "challenge"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--trained-granularity", "channel"), "no --trained-scheme"),
        (("--trained-scheme", "ternary", "--trained-group-size", "8"), "group size belongs to"),
        (("--trained-scheme", "ternary", "--trained-granularity", "group"), "give both or neither"),
        (("--trained-scheme", "ternary", "--trained-activation-bits", "40"), "expected 2 to 16"),
        (("--trained-scheme", "fp"), "is not one of"),
    ],
)
def test_a_scheme_that_contradicts_itself_is_wrong_usage(
    tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = audit(tmp_path, save_tiny(tmp_path / "m"), *options)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_what_cannot_be_opened_ends_with_exit_code_3(tmp_path: Path) -> None:
    packed = save_tiny(tmp_path / "m")
    pack_bitnet(packed)
    assert audit(tmp_path, packed, *SCHEME).code == 2  # it says itself how it runs
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (packed / "config.json").write_text(json.dumps(config))
    done = audit(tmp_path, packed)
    assert (done.code, done.out) == (3, "")
    assert "bitsandbytes" in done.err
    plain = save_tiny(tmp_path / "plain")
    done = audit(tmp_path, plain, "--trained-scheme", "ternary", "--trained-modules", "*.mpl.*")
    assert done.code in (2, 3)
    assert "no linear map of the model" in done.err
