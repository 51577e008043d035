"""Prepare config.json for transformers: keep only what describes the network, and refuse sizes beyond the files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from peelcli.checkpoint.files import CheckpointFiles
from peelcli.errors import CheckpointError

# Keys that say how the model is run, saved, trained or named. None of them describes the network.
_NOT_THE_NETWORK = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "compression_config",
        "distributed_config",
        "dtype",
        "experts_implementation",
        "finetuning_task",
        "fusion_config",
        "generation_config",
        "gradient_checkpointing",
        "id2label",
        "kernel_config",
        "label2id",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "problem_type",
        "pruned_heads",
        "quantization_config",
        "return_dict",
        "task_specific_params",
        "tie_encoder_decoder",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "transformers_weights",
        "use_bfloat16",
        "use_return_dict",
    }
)
# Integer settings that determine no tensor's shape: distances, intervals, ids.
_NO_SIZE = re.compile(
    r"theta|base|freq|position|length|window|seq|ctx|context|seed|step|token|param|size_bytes|total|date|time|id$|ids$"
)
_LAYER_COUNT = re.compile(r"(^|_)layers?$")
_HARMLESS_SIZE = 2**20  # a list or table with this many entries costs no noticeable time
_HARMLESS_LAYERS = 1024
_LARGEST = 2**63 - 1  # torch counts in 64 bits
_PACKED = 32  # a side may be this many times the stored one: an int32 packs 32 one-bit numbers


def for_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without the keys that do not describe the network, at every depth.

    `attn_implementation: eager` is kept, because some families run with no other. Other values depend on the machine.
    """
    dropped = _NOT_THE_NETWORK | _generation_keys()
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key in dropped or (key.startswith("_") and key != "_attn_implementation"):
            continue
        if key == "_attn_implementation" and value != "eager":
            continue
        is_part = isinstance(value, Mapping) and key.endswith("_config")
        kept[key] = for_transformers(value) if is_part else value
    return kept


@cache
def _generation_keys() -> frozenset[str]:
    """The keys of config.json about text generation, except special token ids. peel generates no text."""
    from transformers import GenerationConfig

    return frozenset(key for key in GenerationConfig().to_dict() if not key.endswith("_token_id"))


def require_sizes_in_files(files: CheckpointFiles) -> None:
    """Raise CheckpointError where config.json names a size far beyond every tensor in the files.

    Building a model of 10⁹ layers fills the memory before any tensor is read. So each integer is compared with the
    longest side of any tensor, and the number of layers with the number of tensors.
    """
    longest = max((side for info in files.tensors.values() for side in info.shape), default=0)
    largest = max(_HARMLESS_SIZE, _PACKED * longest)
    most_layers = max(_HARMLESS_LAYERS, len(files.tensors))
    for key, value in _integers(for_transformers(files.config)):
        name = key.rpartition(".")[2]
        if _LAYER_COUNT.search(name) and value > most_layers:
            raise CheckpointError(
                f"{files.directory / 'config.json'}: {key} is {value:,}, and the files hold "
                f"{len(files.tensors):,} tensors. Correct config.json: it and the weights must come from one run"
            )
        if value > (_LARGEST if _NO_SIZE.search(name) else largest):
            raise CheckpointError(
                f"{files.directory / 'config.json'}: {key} is {value:,}, and no tensor in the files is longer than "
                f"{longest:,}. Correct config.json: it and the weights must come from one run"
            )


def _integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every integer in the nested `value`, with the dotted path of its key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _integers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _integers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value
