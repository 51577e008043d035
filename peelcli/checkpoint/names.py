"""Undo what training wrappers do to tensor names: prefixes, inserted parts, and unmerged adapters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

from peelcli.checkpoint.files import CheckpointFiles
from peelcli.errors import CheckpointError

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_ADAPTERS = (
    "base_layer",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
_DEEPEST = 6  # parts of a prefix


def key_mapping(prefix: str) -> dict[str, str]:
    """Pattern → replacement, for transformers' key_mapping: removes `prefix` and the parts that wrappers insert."""
    mapping = {rf"{re.escape(wrapper)}\.": "" for wrapper in WRAPPERS}
    if prefix:
        mapping[f"^{re.escape(prefix)}"] = ""
    return mapping


def renamed(name: str, prefix: str) -> str:
    """`name` as transformers sees it after `key_mapping`."""
    for pattern, value in key_mapping(prefix).items():
        name = re.sub(pattern, value, name)
    return name


def foreign_prefix(names: Iterable[str], expected: Collection[str], base: str) -> str:
    """The prefix whose removal makes most tensor names match the model's; "" if removing none helps.

    expected: the model's own names. base: the prefix that distinguishes the model's names from its bare model's.
    """
    plain = [renamed(name, "") for name in names]
    known = {*expected, *(name.removeprefix(f"{base}.") for name in expected)}
    chains = Counter(
        ".".join(parts[:depth]) + "."
        for parts in (name.split(".") for name in plain)
        for depth in range(1, min(len(parts), _DEEPEST + 1))
    )

    def fitting(prefix: str) -> int:
        return sum(name.removeprefix(prefix) in known for name in plain)

    # Candidates are the prefixes of at least half of the names. Among equally good ones the shortest is used.
    candidates = sorted(chain for chain, count in chains.items() if 2 * count >= len(plain))
    best = max(candidates, key=lambda prefix: (fitting(prefix), -len(prefix)), default="")
    return best if fitting(best) > fitting("") else ""


def require_merged(files: CheckpointFiles) -> None:
    """Raise CheckpointError if the files hold an adapter's low-rank updates that were not merged into the weights."""
    for name in files.tensors:
        if any(part in _ADAPTERS for part in name.split(".")):
            raise CheckpointError(
                f"{files.directory}: {name!r} is part of an adapter (LoRA) that was not merged into the weights. Load "
                "the model with PEFT where it was trained, call model.merge_and_unload(), and save what that returns "
                "with save_pretrained"
            )
