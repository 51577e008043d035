"""Train the two checkpoints of `peel demo`: a healthy model, and its twin with one layer stuck early on.

Both see the same batches from the same initial weights; in the stuck twin one layer leaves the optimiser
after `--stop-step` steps. The text is CPython's language reference (`pydoc_data.topics`), which is also
peel's default calibration text, so the demo needs no data file. To make the assets again:

    python tests/bench/train_demo.py --out peelcli/demo --threads 1

Same seed, Python, torch and thread count give the same files.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

SEQ_LEN = 256
BATCH_SIZE = 16
VOCAB_SIZE = 640
BOS = "<s>"
NUM_SCORED = 48  # sequences behind every figure of the closing table
HELD_OUT_EVERY = 12  # of the text's spans of SPAN paragraphs, one in so many is kept from training
SPAN = 30


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE on `text`; every encoding starts with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, model_max_length=SEQ_LEN)


def windows(text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """One window of SEQ_LEN tokens from each paragraph start on: (training, held out), each (n, SEQ_LEN).

    The topics repeat one another, so a held-out paragraph is kept from training wherever it occurs: no
    training window touches one. Held-out windows lie wholly in held-out spans.
    """
    starts = [0] + [match.end() for match in re.finditer(r"\n[ \t]*\n+", text)]
    paragraphs = [text[a:b].strip() for a, b in zip(starts, starts[1:] + [len(text)], strict=True)]
    in_span = [(i // SPAN) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 for i in range(len(paragraphs))]
    # One-liners such as "Note:" recur all over the text and would bar most of it.
    held = {p for p, inside in zip(paragraphs, in_span, strict=True) if inside and len(p) >= 60}
    barred = [p in held for p in paragraphs]

    train, held_out = [], []
    for i, start in enumerate(starts):
        encoding = tokenizer.backend_tokenizer.encode(text[start : start + 8 * SEQ_LEN])
        if len(encoding) < SEQ_LEN:
            continue  # the end of the text
        end = start + encoding.offsets[SEQ_LEN - 1][1]
        last = next((j for j in range(i, len(starts)) if starts[j] >= end), len(starts))
        if not any(barred[i:last]):
            train.append(encoding.ids[:SEQ_LEN])
        elif all(in_span[i:last]):
            held_out.append(encoding.ids[:SEQ_LEN])
    return torch.tensor(train), torch.tensor(held_out)


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """A fresh Llama; the same seed gives the same weights."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:  # as in GPT-2: what a block adds at first does not grow with depth
            layer.self_attn.o_proj.weight /= math.sqrt(2 * args.layers)
            layer.mlp.down_proj.weight /= math.sqrt(2 * args.layers)
    return model


def train(
    model: LlamaForCausalLM, data: Tensor, held_out: Tensor, args: argparse.Namespace, stuck_layer: int | None
) -> None:
    """AdamW, warm-up, cosine decay; `stuck_layer` (from 1) stops learning after `args.stop_step` steps."""
    order = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay
    )
    warm_up = max(1, args.steps // 20)
    began, mean_loss = time.perf_counter(), 0.0
    for step in range(args.steps):
        if stuck_layer is not None and step == args.stop_step:
            stop_learning(model.model.layers[stuck_layer - 1], optimizer)
        progress = max(0.0, (step - warm_up) / (args.steps - warm_up))
        factor = min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        batch = data[torch.randint(len(data), (BATCH_SIZE,), generator=order)]  # (BATCH_SIZE, SEQ_LEN)
        model.train()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean_loss += loss.item() / 50
        if (step + 1) % 50 == 0:
            held_ce, seconds = cross_entropy(model, held_out), time.perf_counter() - began
            print(
                f"  step {step + 1:5d}  loss {mean_loss:.4f}  held-out {held_ce:.4f}  {seconds:.0f} s",
                flush=True,
            )
            mean_loss = 0.0


def stop_learning(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take the layer's weights out of the optimiser, weight decay included."""
    frozen = {id(parameter) for parameter in layer.parameters()}
    layer.requires_grad_(False)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in frozen]
    for parameter in layer.parameters():
        parameter.grad = None


@torch.no_grad()
def cross_entropy(model: nn.Module, data: Tensor) -> float:
    """Mean next-token cross-entropy on `data` (n, SEQ_LEN), in nats per token."""
    model.eval()
    losses = [model(input_ids=part, labels=part, use_cache=False).loss * len(part) for part in data.split(16)]
    return float(sum(losses) / len(data))


@contextmanager
def dropped(layer: nn.Module) -> Iterator[None]:
    """Within the context the layer passes its input on: its residual update is removed."""

    def pass_on(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    handle = layer.register_forward_hook(pass_on, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def rounded_to_ternary(layer: nn.Module) -> Iterator[None]:
    """Within the context every linear weight is {-1, 0, 1} times its row's mean magnitude, unfitted."""
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    trained = [linear.weight.data for linear in linears]
    for linear, weight in zip(linears, trained, strict=True):
        scale = weight.abs().mean(dim=1, keepdim=True)  # (d_out, 1)
        linear.weight.data = (weight / scale).round().clamp(-1, 1) * scale
    try:
        yield
    finally:
        for linear, weight in zip(linears, trained, strict=True):
            linear.weight.data = weight


def describe(directory: Path, own: Tensor, held_out: Tensor) -> None:
    """Print what the saved checkpoint is worth: read back from disk, so with its float16 weights."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ce_own, ce_held = cross_entropy(model, own), cross_entropy(model, held_out)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(
        f"{directory.name}: CE training text {ce_own:.4f}, held-out {ce_held:.4f} nats/token; {size:,} bytes"
    )
    print("  layer  drop (training)  drop (held-out)  ternary by rounding (training)")
    for number, layer in enumerate(model.model.layers, start=1):
        with dropped(layer):
            drop_own, drop_held = cross_entropy(model, own) - ce_own, cross_entropy(model, held_out) - ce_held
        with rounded_to_ternary(layer):
            ternary = cross_entropy(model, own) - ce_own
        print(f"  {number:5d}  {drop_own:15.4f}  {drop_held:15.4f}  {ternary:30.4f}")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a Hugging Face checkpoint with float16 weights, and check that it opens again."""
    model.requires_grad_(True).half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    ids = AutoTokenizer.from_pretrained(directory)("A paragraph.")["input_ids"]
    if ids[0] != tokenizer.bos_token_id:
        raise SystemExit(f"{directory}: the saved tokenizer begins with token {ids[0]}, expected {BOS}")


def evenly(data: Tensor) -> Tensor:
    """NUM_SCORED windows spread evenly over `data` (n, SEQ_LEN)."""
    return data[torch.linspace(0, len(data) - 1, NUM_SCORED).long()]


def main() -> None:
    """Train, save and describe both twins."""
    parser = argparse.ArgumentParser(description="Train the two checkpoints of `peel demo`.")
    parser.add_argument("--out", type=Path, required=True, help="directory that gets healthy/ and stuck/")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--stop-step", type=int, default=10, help="steps after which the stuck layer stops")
    parser.add_argument("--stuck-layer", type=int, default=3, help="counted from 1")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=80)
    parser.add_argument("--intermediate", type=int, default=216)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--twins", nargs="+", choices=["healthy", "stuck"], default=["healthy", "stuck"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    disable_progress_bar()

    text = "\n\n".join(topics[key] for key in sorted(topics))
    tokenizer = train_tokenizer(text)
    training, held_out = windows(text, tokenizer)
    print(f"{len(text):,} characters; windows: {len(training)} for training, {len(held_out)} held out")
    for twin in args.twins:
        model = build_model(tokenizer, args)
        print(f"{twin}: {model.num_parameters():,} parameters", flush=True)
        train(model, training, evenly(held_out), args, args.stuck_layer if twin == "stuck" else None)
        save(model, tokenizer, args.out / twin)
    for twin in args.twins:
        describe(args.out / twin, evenly(training), evenly(held_out))


if __name__ == "__main__":
    main()
