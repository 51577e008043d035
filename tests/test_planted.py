"""Planted faults in a real trained checkpoint are flagged at their layer, and the checkpoint itself is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import driven

from peelcli.config import ExtractConfig, FitConfig
from peelcli.records import AuditResult
from peelcli.stages.audit import run_audit
from peelcli.stages.workspace import Workspace
from peelcli.verdict import judge

Plant = Callable[[torch.nn.Module], None]


def rotary_permutation_lost(model: torch.nn.Module) -> None:
    attention = model.model.layers[2].self_attn
    for projection, heads in ((attention.q_proj, 8), (attention.k_proj, 4)):
        weight = projection.weight.data
        halves = weight.view(heads, 2, weight.shape[0] // heads // 2, -1)
        projection.weight.data = halves.transpose(1, 2).reshape(weight.shape).contiguous()


def newly_initialised(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    fresh = transformers.AutoModelForCausalLM.from_config(model.config)
    model.model.layers[2].load_state_dict(fresh.model.layers[2].state_dict())


def exchanged(model: torch.nn.Module) -> None:
    second, third = (copy.deepcopy(model.model.layers[i].state_dict()) for i in (1, 2))
    model.model.layers[1].load_state_dict(third)
    model.model.layers[2].load_state_dict(second)


def gate_scaled(model: torch.nn.Module) -> None:
    model.model.layers[3].mlp.gate_proj.weight.data *= 1.5


def audited(
    shared: Path, tmp_path: Path, plant: Plant | None, text: str = "tinystories.txt", **fit: object
) -> AuditResult:
    source = shared / "stories260K-hf"
    directory = source
    if plant is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        plant(model)
        directory = tmp_path / "planted"
        model.save_pretrained(directory)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    extract = ExtractConfig(
        data=(shared / text,), fit_tokens=4096, select_tokens=4096, eval_tokens=8192, threads=1
    )
    settings = FitConfig(**{"references": ("identity",), "ladder": False, "threads": 1, **fit})
    steps = run_audit(directory, extract, settings, Workspace(tmp_path / "work", directory))
    return judge(driven(steps).run)


def test_the_sound_checkpoint_is_not_flagged(shared: Path, tmp_path: Path) -> None:
    fits = {"references": ("identity", "exchange", "direct"), "direct_steps": 8}
    result = audited(shared, tmp_path, None, **fits)
    assert result.flagged == ()
    assert not result.network_flagged
    assert result.network.data_fit == "own"
    assert {v.verdict for v in result.layers} == {"effective"}


@pytest.mark.parametrize("text", ["tinyshakespeare.txt", "wikitext2_valid.txt"])
def test_foreign_text_is_said_to_be_foreign_and_flags_nothing(
    shared: Path, tmp_path: Path, text: str
) -> None:
    result = audited(shared, tmp_path, None, text)
    assert result.flagged == ()
    assert result.network.data_fit == "foreign"
    assert any("--data" in note for note in result.network.notes)


def test_rotary_permutation_lost_blames_the_attention_of_that_layer(shared: Path, tmp_path: Path) -> None:
    result = audited(shared, tmp_path, rotary_permutation_lost)
    assert result.flagged == (3,)
    assert result.layers[2].verdict == "surpassed"
    assert result.layers[2].sublayer == "attention"


def test_newly_initialised_block_is_flagged_alone(shared: Path, tmp_path: Path) -> None:
    assert audited(shared, tmp_path, newly_initialised).flagged == (3,)


def test_two_exchanged_blocks_are_both_flagged_and_no_other_layer(shared: Path, tmp_path: Path) -> None:
    result = audited(shared, tmp_path, exchanged, references=("identity", "exchange"))
    assert result.flagged == (2, 3)
    assert {v.reference.kind for v in result.layers if v.layer in (2, 3) and v.reference} == {"exchange"}


def test_a_lost_scale_is_found_told_and_put_down_to_its_sublayer(shared: Path, tmp_path: Path) -> None:
    result = audited(shared, tmp_path, gate_scaled, references=("identity", "rescale"))
    assert result.flagged == (4,)
    verdict = result.layers[3]
    assert verdict.reference is not None
    assert (verdict.reference.kind, verdict.sublayer) == ("rescale", "mlp")
    assert "gate_proj × 0." in verdict.reason


def test_a_random_network_is_untrained_in_every_layer(shared: Path, tmp_path: Path) -> None:
    def randomise(model: torch.nn.Module) -> None:
        torch.manual_seed(0)
        fresh = transformers.AutoModelForCausalLM.from_config(model.config)
        model.load_state_dict(fresh.state_dict())

    result = audited(shared, tmp_path, randomise)
    assert result.flagged == (1, 2, 3, 4, 5)
    assert "untrained" in result.network.flags
    assert result.network_flagged


# -- a stale layer in a run's newest checkpoint ------------------------------------------------------------------------


def on_the_way(source: Path, share: float, directory: Path) -> Path:
    """A checkpoint of a run that ended in `source`: every layer that share of the way back to where it began."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(1)
    fresh = transformers.AutoModelForCausalLM.from_config(model.config)
    for layer, beginning in zip(model.model.layers, fresh.model.layers, strict=True):
        for parameter, start in zip(layer.parameters(), beginning.parameters(), strict=True):
            parameter.data.lerp_(start.data, share)
    model.save_pretrained(directory)
    return directory


def series_audited(shared: Path, tmp_path: Path, stale_from: int | None) -> AuditResult:
    """The newest of a run's checkpoints, its layer 3 taken from an earlier step."""
    source = shared / "stories260K-hf"
    shares = {100: 0.15, 200: 0.1, 300: 0.05}
    run = {step: on_the_way(source, share, tmp_path / f"step-{step}") for step, share in shares.items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if stale_from is not None:
        older = transformers.AutoModelForCausalLM.from_pretrained(run[stale_from], dtype=torch.float32)
        model.model.layers[2].load_state_dict(older.model.layers[2].state_dict())
    newest = tmp_path / "step-400"
    model.save_pretrained(newest)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(newest)
    extract = ExtractConfig(
        data=(shared / "tinystories.txt",), fit_tokens=1024, select_tokens=2048, eval_tokens=4096, threads=1
    )
    settings = FitConfig(references=("identity", "rollback"), ladder=False, paths=("none",), threads=1)
    earlier = [run[step] for step in (200, 300)]
    steps = run_audit(newest, extract, settings, Workspace(tmp_path / "work", newest), earlier)
    return judge(driven(steps).run)


@pytest.mark.parametrize(
    "stale_from", [100, 200]
)  # 100 is not among the earlier checkpoints; 200 is, byte for byte
def test_a_stale_layer_is_flagged_alone_and_the_newer_step_named(
    stale_from: int, shared: Path, tmp_path: Path
) -> None:
    result = series_audited(shared, tmp_path, stale_from)
    verdict = result.layers[2]
    assert result.flagged == (3,)
    assert verdict.reference is not None
    assert (verdict.verdict, verdict.reference.kind, verdict.reference.origin_step) == (
        "surpassed",
        "rollback",
        300,
    )
    assert "step 300" in verdict.reason
    tried = {s.reference.origin_step for s in result.run.scores if s.reference.layer == 3} - {None}
    assert tried == ({200, 300} if stale_from == 100 else {300})


def test_the_healthy_twin_of_a_stale_checkpoint_is_not_flagged(shared: Path, tmp_path: Path) -> None:
    result = series_audited(shared, tmp_path, None)
    assert result.flagged == ()
    assert not result.network_flagged
    assert {v.verdict for v in result.layers} == {"effective"}
    assert len([s for s in result.run.scores if s.reference.kind == "rollback"]) == 10
