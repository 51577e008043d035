"""Small decoders trained on the spot, and their checkpoints, cached under the digest of their recipe.

    python tests/bench/decoders.py --family llama --precision ternary --cache /somewhere

Full precision, or ternary and binary by straight-through fake quantisation of the blocks' matrices (per output channel,
scale mean |w|); what is saved of those holds the quantised weights. BitNet's are saved latent, as they are trained.
Same recipe, torch and threads: same files.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from low_bit_training import bit_linear, low_bit
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

TEST_TOKENS = 10_000  # held out for the figures, and as many again to choose by
FAMILIES, PRECISIONS = ("llama", "gpt2", "bitnet"), ("fp", "ternary", "binary", "bitnet")
SUBMODULES = {
    "block": ("",),
    "attention": ("self_attn", "attn", "input_layernorm", "ln_1"),
    "mlp": ("mlp", "post_attention_layernorm", "ln_2"),
}
LATER = (
    "tokenizer",
    "initial_spread",
    "slow_layer",
    "slow_part",
    "slow_rate",
    "stops_at",
)  # fields that came later


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on; ValueError for what no run could be made of."""

    family: str = "llama"
    precision: str = "fp"
    learning_rate: float = 3e-3
    steps: int = 800
    saved_steps: tuple[int, ...] = (0, 50, 100, 200, 400, 800)
    seed: int = 0
    num_layers: int = 4
    d_model: int = 96
    num_heads: int = 4
    seq_len: int = 128
    batch_size: int = 16
    train_tokens: int = 100_000
    corpus: str = "tinyshakespeare.txt"
    tokenizer: str | int = "characters"  # or the size of a byte-pair vocabulary
    initial_spread: float = 0.02  # of the initial weights
    slow_layer: int = 0  # a layer, counted from 1, that learns less than the others; 0 for none
    slow_part: str = "block"  # or "attention", "mlp" alone
    slow_rate: float = 1.0  # its learning rate, as a share of the others'
    stops_at: float = (
        1.0  # the share of the steps after which it learns nothing; 0: frozen at its initial weights
    )

    def __post_init__(self) -> None:
        _check("family", self.family, FAMILIES)
        _check("precision", self.precision, PRECISIONS)
        _check("slow part", self.slow_part, tuple(SUBMODULES))
        if isinstance(self.tokenizer, str):
            _check("tokenizer", self.tokenizer, ("characters", "the size of a byte-pair vocabulary"))
        elif self.tokenizer < 256:
            raise ValueError(
                f"byte-pair vocabulary of {self.tokenizer}: expected 256 or more, one for each byte"
            )
        beyond = [step for step in self.saved_steps if not 0 <= step <= self.steps]
        if beyond:
            raise ValueError(f"saved steps {beyond}: expected 0 to {self.steps}, the steps of the run")

    @property
    def digest(self) -> str:
        """Names the recipe."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        # What is as it was before there was a choice keeps its name.
        fields = {k: v for k, v in asdict(self).items() if k not in LATER or v != defaults[k]}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def _check(field: str, found: str, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise ValueError(f"{field} {found!r}: expected one of {', '.join(expected)}")


@dataclass(frozen=True)
class TokenSet:
    """Ids (n,) of text that follows on: trained on, held out to choose by, held out for the figures."""

    train: Tensor
    select: Tensor
    test: Tensor
    vocab_size: int


def text_of(recipe: Recipe, shared: Path) -> str:
    """The corpus."""
    return (shared / recipe.corpus).read_text(encoding="utf-8")


def character_tokenizer(text: str) -> transformers.PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {c: i for i, c in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=min(vocabulary)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_pair_tokenizer(text: str, vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with the merges of `text`; ValueError where it has too few of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise ValueError(f"byte-pair vocabulary of {vocab_size}: the text gives {found}; ask for no more")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tokenizer_of(recipe: Recipe, text: str) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer; merges are learnt on as many characters as there are training tokens, none of them held out."""
    if isinstance(recipe.tokenizer, int):
        return byte_pair_tokenizer(text[: recipe.train_tokens], recipe.tokenizer)
    return character_tokenizer(text)


def tokens(recipe: Recipe, shared: Path) -> TokenSet:
    """The first `train_tokens` tokens, and two stretches of those that follow; ValueError where the text is short."""
    text = text_of(recipe, shared)
    tokenizer = tokenizer_of(recipe, text)
    ends = recipe.train_tokens + TEST_TOKENS * torch.arange(3)
    needed = int(ends[-1])
    if recipe.tokenizer == "characters":
        text = text[:needed]  # the rest need not be encoded
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids[:needed])
    if len(ids) < needed:
        raise ValueError(f"{recipe.corpus}: expected {needed} tokens, found {len(ids)}; train on fewer")
    train, select, test = ids.tensor_split(ends[:2].tolist())
    return TokenSet(train, select, test, len(tokenizer))


def build(recipe: Recipe, vocab_size: int) -> nn.Module:
    """The model at its initial weights."""
    torch.manual_seed(recipe.seed)
    if recipe.family == "gpt2":
        config: transformers.PretrainedConfig = transformers.GPT2Config(
            vocab_size=vocab_size,
            n_embd=recipe.d_model,
            n_layer=recipe.num_layers,
            n_head=recipe.num_heads,
            n_positions=2 * recipe.seq_len,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
            initializer_range=recipe.initial_spread,
        )
    else:
        # BitNet's blocks are Llama's with a norm before what each sublayer gives, and squares in its MLP.
        kind = transformers.BitNetConfig if recipe.family == "bitnet" else transformers.LlamaConfig
        config = kind(
            vocab_size=vocab_size,
            hidden_size=recipe.d_model,
            intermediate_size=8 * recipe.d_model // 3,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_heads,
            max_position_embeddings=2 * recipe.seq_len,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
            initializer_range=recipe.initial_spread,
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    return bit_linear(model) if recipe.precision == "bitnet" else model


def snapshot(model: nn.Module, precision: str, fresh: nn.Module) -> nn.Module:
    """A plain copy, with the quantised weights where there are any."""
    values = {}
    for name, _ in fresh.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        values[name] = getattr(owner, name.rpartition(".")[2]).detach().clone()
    fresh.load_state_dict(values, strict=False)
    return fresh


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks."""
    return model.model.layers if hasattr(model, "model") else model.transformer.h  # type: ignore[union-attr, return-value]


def part_of(block: nn.Module, part: str) -> list[nn.Module]:
    """The modules of a block that make up "block", "attention" or "mlp", each with the norm before it."""
    return [block] if part == "block" else [m for n, m in block.named_children() if n in SUBMODULES[part]]


def slow_parameters(model: nn.Module, recipe: Recipe) -> set[nn.Parameter]:
    """Those that learn less than the others."""
    if not recipe.slow_layer:
        return set()
    modules = part_of(blocks_of(model)[recipe.slow_layer - 1], recipe.slow_part)
    return {p for module in modules for p in module.parameters()}


def batches(recipe: Recipe, train: Tensor) -> Iterator[Tensor]:
    """Random windows (batch_size, seq_len)."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        starts = torch.randint(len(train) - recipe.seq_len, (recipe.batch_size,), generator=generator)
        yield torch.stack([train[s : s + recipe.seq_len] for s in starts.tolist()])


@torch.no_grad()
def loss_on(model: nn.Module, ids: Tensor, seq_len: int) -> float:
    """Mean CE, nats per token, over the windows of `ids` that do not overlap."""
    rows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(16)]
    return sum(losses) / len(rows)


def train(recipe: Recipe, shared: Path, cache: Path) -> dict[int, Path]:
    """Step → checkpoint directory; trains only what the cache lacks. LOSSES.json there has step → [train, test] CE."""
    home = cache / recipe.digest
    if not home.exists():
        partial = cache / f"{recipe.digest}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _train(recipe, shared, partial)
        partial.rename(home)
    return {step: home / f"checkpoint-{step}" for step in recipe.saved_steps}


def _train(recipe: Recipe, shared: Path, home: Path) -> None:
    data = tokens(recipe, shared)
    model, fresh = build(recipe, data.vocab_size), build(recipe, data.vocab_size)
    tokenizer = tokenizer_of(recipe, text_of(recipe, shared))
    losses: dict[int, list[float]] = {}
    began = time.perf_counter()

    def save(step: int) -> None:
        losses[step] = [
            loss_on(model, data.train[: 8 * TEST_TOKENS : 1], recipe.seq_len),
            loss_on(model, data.test, recipe.seq_len),
        ]
        model.train()
        directory = home / f"checkpoint-{step}"
        snapshot(model, recipe.precision, fresh).save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    with low_bit(blocks_of(model), recipe.precision):
        slow = slow_parameters(model, recipe)
        groups = [
            {
                "params": [
                    p for p in model.parameters() if (p.ndim > 1) == is_matrix and (p in slow) == is_slow
                ],
                "weight_decay": 0.1 * is_matrix,
                "is_slow": is_slow,
            }
            for is_matrix in (True, False)
            for is_slow in (False, True)
        ]
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
        source = batches(recipe, data.train)
        if 0 in recipe.saved_steps:
            save(0)
        for step in range(1, recipe.steps + 1):
            warm = min(1.0, step / (0.05 * recipe.steps))
            for group in optimizer.param_groups:
                cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
                share = (
                    recipe.slow_rate * (step <= recipe.stops_at * recipe.steps) if group["is_slow"] else 1.0
                )
                group["lr"] = share * recipe.learning_rate * warm * (0.05 + 0.95 * cosine)
            ids = next(source)
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step in recipe.saved_steps:
                save(step)
    about = {"recipe": asdict(recipe), "seconds": time.perf_counter() - began, "losses": losses}
    (home / "LOSSES.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def main() -> None:
    """Train one recipe and print its losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--family", default="llama", choices=FAMILIES)
    parser.add_argument("--precision", default="fp", choices=PRECISIONS)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument(
        "--saved-steps",
        type=int,
        nargs="+",
        help="0 is at initialisation; default: the usual ones, and the last",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument(
        "--shared", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    usual = (*(step for step in Recipe.saved_steps if step < options.steps), options.steps)
    recipe = Recipe(
        family=options.family,
        precision=options.precision,
        learning_rate=options.learning_rate,
        steps=options.steps,
        saved_steps=tuple(options.saved_steps or usual),
        seed=options.seed,
    )
    found = train(recipe, options.shared, options.cache)
    about = json.loads((options.cache / recipe.digest / "LOSSES.json").read_text(encoding="utf-8"))
    print(recipe, f"{about['seconds']:.0f} s")
    for step, (on_train, on_test) in about["losses"].items():
        print(f"step {step:>5}  train {on_train:.3f}  test {on_test:.3f}  {found[int(step)]}")


if __name__ == "__main__":
    main()
