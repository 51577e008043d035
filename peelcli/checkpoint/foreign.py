"""Recognise other tools' checkpoint formats by file name, and say how to convert them."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from peelcli.checkpoint.adapter import find_adapter, how_to_merge, is_adapter_file

# File patterns, the name of the format, and how to make a directory of it that peel can open.
_FOREIGN = (
    (
        ("checkpoint-*/config.json",),
        "a Trainer's output directory",
        "name one of its checkpoint-… directories",
    ),
    (
        ("model_optim_rng.pt", "mp_rank_*/*", "iter_*/mp_rank_*", "latest_checkpointed_iteration.txt"),
        "a Megatron-LM checkpoint",
        "export it to Hugging Face's format with Megatron Bridge or Megatron-LM's checkpoint converter",
    ),
    (
        ("mp_rank_*.pt", "global_step*", "zero_pp_rank_*", "*_optim_states.pt"),
        "a DeepSpeed checkpoint",
        "merge its shards with DeepSpeed's zero_to_fp32.py, then save_pretrained",
    ),
    (
        ("*.distcp", ".metadata", "*/*.distcp", "*/.metadata"),
        "a PyTorch distributed checkpoint (DCP)",
        "merge it with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`, then "
        "save_pretrained",
    ),
    (
        ("*.ckpt",),
        "a Lightning checkpoint",
        "load its state_dict into the transformers model, then save_pretrained",
    ),
    (
        ("*.gguf",),
        "a GGUF file",
        "read it with AutoModelForCausalLM.from_pretrained(…, gguf_file=…), then save_pretrained",
    ),
    (
        ("ckpt.pt",),
        "a nanoGPT checkpoint",
        "copy its 'model' weights into a GPT2LMHeadModel, then save_pretrained",
    ),
    (
        ("tf_model*.h5", "flax_model*.msgpack"),
        "TensorFlow or Flax weights",
        "load them with a transformers 4 (from_tf or from_flax), then save_pretrained",
    ),
    (
        ("consolidated*.pth", "consolidated*.safetensors"),
        "weights in the original Llama or Mistral layout",
        "convert them with the convert_…_weights_to_hf.py of transformers",
    ),
)
# More general patterns for directories. The first match is used, and only if nothing above matches.
_VAGUE = (
    (
        ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin"),
        "shards whose index is missing",
        "copy model.safetensors.index.json (or pytorch_model.bin.index.json) as well",
    ),
    (("*.safetensors",), "safetensors under another name", "rename a lone file to model.safetensors"),
    (
        ("*.pt", "*.pth"),
        "a bare PyTorch file",
        "load its weights into the transformers model, then save_pretrained",
    ),
)


def how_to_open(path: Path) -> str:
    """The end of an error message about a path that cannot be opened: what it is, and what to do."""
    found = [*_adapter_alone(path), *_matches(path, _FOREIGN)][:3]
    if not found and path.is_file():
        return f"; name the directory it lies in, {path.parent}"
    found = found or _matches(path, _VAGUE)[:1]
    if not found:
        return "; copy or download the checkpoint again, or save it with save_pretrained"
    return ". " + "; ".join(found)


def _adapter_alone(path: Path) -> list[str]:
    """The sentence for a directory that holds an adapter without its base model: it must be merged first."""
    if path.is_file() and not is_adapter_file(path.name):
        return []
    directory = path.parent if path.is_file() else path
    adapter = find_adapter(directory) if directory.is_dir() else None
    return (
        []
        if adapter is None
        else [f"{adapter}, without that model's weights: {how_to_merge(adapter, directory)}"]
    )


def _matches(path: Path, table: tuple[tuple[tuple[str, ...], str, str], ...]) -> list[str]:
    examples = [_first_match(path, patterns) for patterns, _, _ in table]
    return [
        f"{example} is {what}: {how}"
        for example, (_, what, how) in zip(examples, table, strict=True)
        if example is not None
    ]


def _first_match(path: Path, patterns: tuple[str, ...]) -> str | None:
    if path.is_file():
        return path.name if any(fnmatch(path.name, pattern) for pattern in patterns) else None
    matches = (str(match.relative_to(path)) for pattern in patterns for match in sorted(path.glob(pattern)))
    return next(matches, None)
