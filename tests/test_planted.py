"""Planted faults in a real trained checkpoint are flagged at their layer, and the checkpoint itself is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from peelcli.audit import audit_steps
from peelcli.config import ExtractConfig, FitConfig
from peelcli.records import AuditResult
from peelcli.verdict import judge
from peelcli.workspace import Workspace

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
    steps = audit_steps(directory, extract, settings, Workspace(tmp_path / "work", directory))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return judge(end.value.run)


def test_the_sound_checkpoint_is_not_flagged(shared: Path, tmp_path: Path) -> None:
    fits = {"references": ("identity", "direct"), "direct_steps": 8}
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


def test_of_two_exchanged_blocks_one_is_flagged_and_no_other_layer(shared: Path, tmp_path: Path) -> None:
    flagged = audited(shared, tmp_path, exchanged).flagged
    assert flagged
    assert set(flagged) <= {2, 3}


def test_a_random_network_is_untrained_in_every_layer(shared: Path, tmp_path: Path) -> None:
    def randomise(model: torch.nn.Module) -> None:
        torch.manual_seed(0)
        fresh = transformers.AutoModelForCausalLM.from_config(model.config)
        model.load_state_dict(fresh.state_dict())

    result = audited(shared, tmp_path, randomise)
    assert result.flagged == (1, 2, 3, 4, 5)
    assert "untrained" in result.network.flags
    assert result.network_flagged
