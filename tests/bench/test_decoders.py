"""Small decoders: what is saved opens and lies on its grid, nothing is trained twice, held-out text stays held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import decoders
import pytest
import torch
from conftest import logits, opened
from decoders import Recipe, text_of, tokenizer_of, tokens, train
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from peelcli.quant.grid import Grid, recognise_grid

TINY = Recipe(
    num_layers=2,
    d_model=32,
    num_heads=2,
    seq_len=32,
    batch_size=2,
    steps=3,
    saved_steps=(0, 3),
    train_tokens=2000,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def block_matrices(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The matrices of the blocks, (d_out, d_in)."""
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    for module in blocks.modules():
        if isinstance(module, Conv1D):
            yield module.weight.detach().T.contiguous()
        elif isinstance(module, torch.nn.Linear):
            yield module.weight.detach()


@pytest.mark.parametrize(("family", "per_block"), [("llama", 7), ("gpt2", 4)])
@pytest.mark.parametrize(("precision", "levels"), [("fp", None), ("ternary", 3), ("binary", 2)])
def test_checkpoints_open_and_lie_on_their_grid(
    family: str, per_block: int, precision: str, levels: int | None, tmp_path: Path, shared: Path
) -> None:
    found = train(replace(TINY, family=family, precision=precision), shared, tmp_path)
    assert [path.name for path in found.values()] == ["checkpoint-0", "checkpoint-3"]
    for directory in found.values():
        model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not any(info.values())
        matrices = list(block_matrices(model))
        assert len(matrices) == per_block * TINY.num_layers
        for weight in matrices:
            grid = recognise_grid(weight)
            if levels is None:
                assert grid is None
            else:
                assert isinstance(grid, Grid)
                assert grid.spec.grid == (precision, None)
                assert max(len(channel.unique()) for channel in weight) == levels  # exactly, not to rounding
        assert recognise_grid(model.lm_head.weight) is None
        assert recognise_grid(model.get_input_embeddings().weight) is None


@pytest.mark.parametrize("family", ["llama", "bitnet"])
def test_bitnet_trains_with_what_transformers_and_peel_run(family: str, tmp_path: Path, shared: Path) -> None:
    recipe = replace(TINY, family=family, precision="bitnet", steps=30, saved_steps=(30,), initial_spread=0.2)
    with torch.compiler.set_stance("force_eager"):
        directory = train(recipe, shared, tmp_path)[30]
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        ids = tokens(recipe, shared).test[: 312 * recipe.seq_len].view(-1, recipe.seq_len)
        theirs = plain(ids).logits.detach()
    ours = logits(opened(directory, tmp_path / "work"), ids)
    trained = json.loads((directory.parent / "LOSSES.json").read_text(encoding="utf-8"))["losses"]["30"][1]
    for found in (theirs, ours):
        loss = cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert float(loss) == pytest.approx(trained, abs=3e-6)
    # A last bit may send an input that is half-way between two levels the other way: of few tokens.
    assert float(((ours - theirs).abs().amax(-1) < 1e-4).float().mean()) > 0.99


@pytest.mark.parametrize("precision", ["fp", "ternary"])
def test_training_moves_the_weights_and_repeats_itself(precision: str, tmp_path: Path, shared: Path) -> None:
    recipe = replace(TINY, precision=precision, learning_rate=3e-2)
    once, again = (train(recipe, shared, tmp_path / name) for name in ("once", "again"))
    files = [(once[step] / "model.safetensors").read_bytes() for step in (0, 3)]
    assert files[0] != files[1]
    assert files == [(again[step] / "model.safetensors").read_bytes() for step in (0, 3)]


def test_a_finished_run_is_not_trained_again(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = train(TINY, shared, tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(decoders, "_train", refuse)
    assert train(TINY, shared, tmp_path) == found
    with pytest.raises(AssertionError, match="trained again"):
        train(replace(TINY, seed=1), shared, tmp_path)


def test_an_interrupted_run_leaves_nothing_under_its_name(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = decoders.snapshot
    calls = []

    def interrupt(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(*args)

    monkeypatch.setattr(decoders, "snapshot", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, shared, tmp_path)
    assert not (tmp_path / TINY.digest).exists()
    monkeypatch.undo()
    assert all((path / "model.safetensors").exists() for path in train(TINY, shared, tmp_path).values())


@pytest.mark.parametrize("tokenizer", ["characters", 300])
def test_parts_follow_on_without_overlap(tokenizer: str | int, shared: Path) -> None:
    recipe = replace(TINY, tokenizer=tokenizer)
    parts, text = tokens(recipe, shared), text_of(recipe, shared)
    decode = tokenizer_of(recipe, text).decode
    assert [len(part) for part in (parts.train, parts.select, parts.test)] == [2000, 10_000, 10_000]
    # That the pieces make up the beginning of the text, each character once, is that none shares a character.
    whole = decode(parts.train) + decode(parts.select) + decode(parts.test)
    assert whole == text[: len(whole)]
    assert len(whole) >= 22_000
    assert parts.vocab_size == (65 if tokenizer == "characters" else 300)


@pytest.mark.parametrize("tokenizer", ["characters", 300])
def test_the_saved_tokenizer_gives_the_tokens_trained_on(
    tokenizer: str | int, tmp_path: Path, shared: Path
) -> None:
    recipe = replace(TINY, tokenizer=tokenizer, saved_steps=(3,))
    directory = train(recipe, shared, tmp_path)[3]
    opened, text = AutoTokenizer.from_pretrained(directory), text_of(recipe, shared)[:5000]
    ids = opened(text)["input_ids"]
    assert opened.decode(ids) == text
    assert ids[:1000] == tokens(recipe, shared).train[:1000].tolist()


def test_every_field_names_another_run_and_early_caches_keep_theirs() -> None:
    others = [
        replace(TINY, **{field: value})
        for field, value in {
            "family": "gpt2",
            "precision": "binary",
            "seed": 1,
            "tokenizer": 300,
            "d_model": 48,
        }.items()
    ]
    assert len({recipe.digest for recipe in (TINY, *others)}) == len(others) + 1
    assert Recipe().digest == "93f77ee0f2eb"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: replace(TINY, family="gpt"), "'gpt'.*llama, gpt2"),
        (lambda: replace(TINY, precision="int4"), "'int4'.*ternary"),
        (lambda: replace(TINY, tokenizer="words"), "'words'.*characters"),
        (lambda: replace(TINY, tokenizer=100), "100.*256"),
        (lambda: replace(TINY, saved_steps=(0, 4)), r"\[4\].*0 to 3"),
    ],
)
def test_recipes_that_no_run_could_be_made_of(wrong: Callable[[], Recipe], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        wrong()


def test_a_text_that_is_too_short_is_refused(shared: Path) -> None:
    with pytest.raises(ValueError, match=r"tinyshakespeare.txt: expected 2020000 tokens, found 1115394"):
        tokens(replace(TINY, train_tokens=2_000_000), shared)
