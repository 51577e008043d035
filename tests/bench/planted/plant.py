"""Builds the checkpoint of a case: trains what the cache lacks, and hurts the layer where that is done afterwards."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from decoders import Recipe, blocks_of, build, part_of, text_of, tokenizer_of, train
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from planted.cases import BASES, Base, Case

AUDIT_CHARS, TRUTH_CHARS = 130_000, 45_000  # of held-out text


def checkpoint_of(case: Case, shared: Path, cache: Path) -> Path:
    """The directory of the case's checkpoint."""
    base = BASES[case.base]
    if case.kind == "healthy":
        return train(base.other_seed if case.severity else base.recipe, shared, cache)[base.recipe.steps]
    if case.kind == "early":
        return train(base.recipe, shared, cache)[round(case.severity * base.recipe.steps)]
    if case.kind in ("stopped", "slow"):
        field = "stops_at" if case.kind == "stopped" else "slow_rate"
        hurt = {"slow_layer": case.layers[0], "slow_part": case.part, field: case.severity}
        return train(replace(base.recipe, saved_steps=(base.recipe.steps,), **hurt), shared, cache)[
            base.recipe.steps
        ]
    home = cache / "planted" / case.name
    if not home.exists():
        source = train(base.recipe, shared, cache)[base.recipe.steps]
        model = load(source)
        AFTER[case.kind](model, case, base, shared, cache)
        partial = home.with_name(home.name + ".partial")
        model.save_pretrained(partial)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(partial)
        shutil.rmtree(home, ignore_errors=True)
        partial.rename(home)
    return home


def twin_of(case: Case, shared: Path, cache: Path) -> Path:
    """The same run without the fault."""
    recipe = BASES[case.base].recipe
    return train(recipe, shared, cache)[recipe.steps]


def held_out_text(recipe: Recipe, shared: Path, cache: Path) -> Path:
    """A file with the text that follows what the models of the recipe were trained on; for the audits."""
    return _held_out(recipe, shared, cache)[0]


def held_out_ids(recipe: Recipe, shared: Path, cache: Path, count: int) -> Tensor:
    """Token ids (n, seq_len) of the text behind that; for the truth."""
    text = _held_out(recipe, shared, cache)[1].read_text(encoding="utf-8")
    ids = tokenizer_of(recipe, text_of(recipe, shared)).backend_tokenizer.encode(text).ids[:count]
    return torch.tensor(ids[: len(ids) // recipe.seq_len * recipe.seq_len]).view(-1, recipe.seq_len)


def _held_out(recipe: Recipe, shared: Path, cache: Path) -> tuple[Path, Path]:
    home = cache / f"held-out-{recipe.corpus}-{recipe.train_tokens}-{recipe.tokenizer}"
    if not home.exists():
        text = text_of(recipe, shared)
        encoding = tokenizer_of(recipe, text).backend_tokenizer.encode(text[: 5 * recipe.train_tokens])
        begin = encoding.offsets[recipe.train_tokens][0]
        partial = home.with_name(f"{home.name}.{os.getpid()}")
        partial.mkdir(parents=True)
        middle, end = begin + AUDIT_CHARS, begin + AUDIT_CHARS + TRUTH_CHARS
        (partial / "audit.txt").write_text(text[begin:middle], encoding="utf-8")
        (partial / "truth.txt").write_text(text[middle:end], encoding="utf-8")
        if not home.exists():
            partial.rename(home)
    return home / "audit.txt", home / "truth.txt"


def load(directory: Path) -> nn.Module:
    """The model of a checkpoint, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def _generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(BASES[case.base].recipe.seed + 1000 * case.layers[0])


def _matrices(block: nn.Module, part: str) -> list[nn.Module]:
    return [m for p in part_of(block, part) for m in p.modules() if isinstance(m, (nn.Linear, Conv1D))]


def _put(model: nn.Module, source: nn.Module, layer: int, part: str) -> None:
    """Give a layer, or a part of it, the weights that it has in `source`."""
    pairs = zip(
        part_of(blocks_of(model)[layer - 1], part), part_of(blocks_of(source)[layer - 1], part), strict=True
    )
    for mine, its in pairs:
        mine.load_state_dict(its.state_dict())


def _new_weights(model: nn.Module, case: Case, base: Base, shared: Path, cache: Path) -> None:
    fresh = build(replace(base.recipe, seed=base.recipe.seed + 500), model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    _put(model, fresh, case.layers[0], case.part)


def _older(model: nn.Module, case: Case, base: Base, shared: Path, cache: Path) -> None:
    older = train(base.recipe, shared, cache)[round(case.severity * base.recipe.steps)]
    _put(model, load(older), case.layers[0], case.part)


def _other_seed(model: nn.Module, case: Case, base: Base, shared: Path, cache: Path) -> None:
    _put(model, load(train(base.other_seed, shared, cache)[base.recipe.steps]), case.layers[0], case.part)


def _exchanged(model: nn.Module, case: Case, base: Base, shared: Path, cache: Path) -> None:
    one, other = (blocks_of(model)[layer - 1] for layer in case.layers)
    kept = copy.deepcopy(one.state_dict())
    one.load_state_dict(other.state_dict())
    other.load_state_dict(kept)


@torch.no_grad()
def _noise(model: nn.Module, case: Case, base: Base, shared: Path, cache: Path) -> None:
    generator = _generator(case)
    for m in _matrices(blocks_of(model)[case.layers[0] - 1], case.part):
        spread = case.severity * float(m.weight.std())
        m.weight += spread * torch.randn(m.weight.shape, generator=generator)  # type: ignore[operator]


@torch.no_grad()
def _rotary_lost(model: nn.Module, case: Case, base: Base, shared: Path, cache: Path) -> None:
    attention = blocks_of(model)[case.layers[0] - 1].self_attn
    heads = model.config.num_attention_heads  # type: ignore[union-attr]
    for projection in (attention.q_proj, attention.k_proj):  # type: ignore[union-attr]
        weight = projection.weight  # type: ignore[union-attr]
        halves = weight.view(heads, 2, weight.shape[0] // heads // 2, -1)  # type: ignore[operator, index]
        weight.copy_(halves.transpose(1, 2).reshape(weight.shape))  # type: ignore[operator]


@torch.no_grad()
def _heads_shuffled(model: nn.Module, case: Case, base: Base, shared: Path, cache: Path) -> None:
    """The heads of the output projection in another order than those of q, k and v."""
    heads = base.recipe.num_heads
    block = blocks_of(model)[case.layers[0] - 1]
    is_gpt2 = base.recipe.family == "gpt2"
    weight = block.attn.c_proj.weight if is_gpt2 else block.self_attn.o_proj.weight  # type: ignore[union-attr]
    oriented = weight.T if is_gpt2 else weight  # (d_model, heads · d_head)
    split = oriented.reshape(oriented.shape[0], heads, -1)  # type: ignore[operator, index]
    turned = split.roll(1, dims=1).reshape(oriented.shape)
    weight.copy_(turned.T if is_gpt2 else turned)  # type: ignore[operator]


@torch.no_grad()
def _scales_off(model: nn.Module, case: Case, base: Base, shared: Path, cache: Path) -> None:
    for m in _matrices(blocks_of(model)[case.layers[0] - 1], case.part):
        m.weight *= case.severity  # type: ignore[operator]


@torch.no_grad()
def _fewer_bits(model: nn.Module, case: Case, base: Base, shared: Path, cache: Path) -> None:
    for m in _matrices(blocks_of(model)[case.layers[0] - 1], case.part):
        weight, dim = m.weight, 0 if isinstance(m, Conv1D) else 1
        scale = weight.abs().mean(dim, keepdim=True)  # type: ignore[operator]
        weight.copy_(torch.where(weight >= 0, scale, -scale))  # type: ignore[operator]


AFTER: dict[str, Callable[[nn.Module, Case, Base, Path, Path], None]] = {
    "new weights": _new_weights,
    "older": _older,
    "other seed": _other_seed,
    "exchanged": _exchanged,
    "noise": _noise,
    "rotary lost": _rotary_lost,
    "heads shuffled": _heads_shuffled,
    "scales off": _scales_off,
    "fewer bits": _fewer_bits,
}
