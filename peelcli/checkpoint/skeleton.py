"""Build the model that config.json describes without weights, and compare it with the tensors in the files.

Building stops as soon as the model is larger than the files can fill, so a config of absurd sizes costs nothing. Then
transformers loads tensors that have shapes but no contents. Its own renaming and conversion of weights shows which
names and shapes do not fit, before any weight is read.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import AutoConfig, AutoModelForCausalLM

from peelcli.checkpoint.config_json import for_transformers, require_sizes_in_files
from peelcli.checkpoint.files import CheckpointFiles
from peelcli.checkpoint.library import over_files, without_report
from peelcli.checkpoint.names import foreign_prefix, key_mapping, renamed, require_merged
from peelcli.checkpoint.structure import find_blocks, layer_counts, stated, text_config
from peelcli.errors import CheckpointError
from peelcli.records import Finding

SAME_RUN = "Check that config.json and the weights come from the same run."
_CORRECT = "Correct config.json. peel audits decoder-only models that transformers itself implements."
# A model may have more than the files hold: tied matrices built separately, fused weights that are split, masks.
_NUMEL_RATIO, _COUNT_RATIO, _FREE_NUMEL, _FREE_COUNT = 4, 64, 2**24, 2**12
_MOST_TENSORS = 1024  # stored tensors per weight of the model: at most the number of experts in a layer


@dataclass(frozen=True)
class Rehearsal:
    """The result of a trial load. prefix: what is stripped from the stored tensors' names."""

    prefix: str
    no_weights: frozenset[str]  # tensors that the model does not load, or loads as buffers
    findings: tuple[Finding, ...]

    @property
    def key_mapping(self) -> dict[str, str]:
        """Pattern → replacement for the names in the files, for transformers' key_mapping."""
        return key_mapping(self.prefix)


def build_skeleton(files: CheckpointFiles) -> tuple[Any, nn.Module, str]:
    """The config, its model without weights, and the name of the model's list of blocks.

    Raises CheckpointError if transformers cannot build the model, or if the model is larger than the files.
    """
    require_sizes_in_files(files)
    with over_files(files.directory / "config.json", "build the model that it describes", _CORRECT):
        config = _read_config(files)
        with _no_larger_than(files), torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        blocks = find_blocks(skeleton, layer_counts(config))
    positions = stated(text_config(config), "max_position_embeddings")
    # XLNet, which knows no limit, says −1 of itself; a file has no reason to.
    is_no_limit = positions == -1 and "max_position_embeddings" not in files.config
    if positions is not None and not is_no_limit and not (isinstance(positions, int) and positions > 0):
        raise CheckpointError(
            f"{files.directory / 'config.json'}: max_position_embeddings is {positions!r}, expected a number "
            "above 0. Correct config.json."
        )
    return config, skeleton, blocks


def _read_config(files: CheckpointFiles) -> Any:
    # transformers reads a config from a directory, and peel needs what it does then (such as Mistral's two kinds).
    with tempfile.TemporaryDirectory(prefix="peel-config-") as directory:
        text = json.dumps(for_transformers(files.config))
        (Path(directory) / "config.json").write_text(text, encoding="utf-8")
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def _no_larger_than(files: CheckpointFiles) -> Iterator[None]:
    """Within the context, raise CheckpointError once the model built by this thread is larger than the files."""
    numel = _NUMEL_RATIO * sum(info.numel for info in files.tensors.values()) + _FREE_NUMEL
    count = _COUNT_RATIO * len(files.tensors) + _FREE_COUNT
    built: Counter[str] = Counter()
    thread = threading.get_ident()

    def add(kind: str, size: int) -> None:
        if threading.get_ident() != thread:
            return
        built[f"{kind}s"] += 1
        built[f"numbers in its {kind}s"] += size
        if built[f"{kind}s"] > count or built[f"numbers in its {kind}s"] > numel:
            what = f"{kind}s" if built[f"{kind}s"] > count else f"numbers in its {kind}s"
            raise CheckpointError(
                f"{files.directory / 'config.json'}: the model that it describes has more than {built[what] - 1:,} "
                f"{what}, and the files hold {len(files.tensors):,} tensors of "
                f"{sum(info.numel for info in files.tensors.values()):,} numbers. {SAME_RUN}"
            )

    hooks = [
        torch_module.register_module_parameter_registration_hook(
            lambda _, __, value: add("parameter", 0 if value is None else value.numel())
        ),
        torch_module.register_module_buffer_registration_hook(
            lambda _, __, value: add("buffer", 0 if value is None else value.numel())
        ),
        torch_module.register_module_module_registration_hook(lambda _, __, ___: add("module", 0)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rehearse(files: CheckpointFiles, skeleton: nn.Module) -> Rehearsal:
    """Load the files' tensors by name and shape only. Raises CheckpointError if they do not fit the model."""
    require_merged(files)
    expected = set(skeleton.state_dict())
    if len(files.tensors) > _MOST_TENSORS * len(expected):
        raise CheckpointError(
            f"{files.directory}: holds {len(files.tensors):,} tensors, and the model that config.json describes has "
            f"{len(expected):,} weights. {SAME_RUN}"
        )
    info = _load_shapes(files, skeleton, "")
    prefix = ""
    if info["missing_keys"]:
        prefix = foreign_prefix(files.tensors, expected, str(getattr(skeleton, "base_model_prefix", "")))
        if prefix:
            info = _load_shapes(files, skeleton, prefix)
    _require_shapes(files, info["mismatched_keys"])
    _require_names(files, prefix, info)
    buffers = {name for name, _ in skeleton.named_buffers()}
    ignored = set(info["unexpected_keys"])
    parameters = {name for name, _ in skeleton.named_parameters()}
    base = str(getattr(skeleton, "base_model_prefix", "")) + "."
    no_weights = set()
    for name in files.tensors:
        plain = renamed(name, prefix)
        forms = {name, plain, base + plain, plain.removeprefix(base)}
        if forms & parameters:
            continue
        if forms & (buffers | ignored) or _is_ignored(skeleton, forms):
            no_weights.add(name)
    return Rehearsal(prefix, frozenset(no_weights), (_prefix_finding(prefix),) if prefix else ())


def _prefix_finding(prefix: str) -> Finding:
    message = f"the tensors' names begin with {prefix!r}, which the model's do not: it was stripped, nothing is left"
    return Finding("foreign-prefix", message)


def _load_shapes(files: CheckpointFiles, skeleton: nn.Module, prefix: str) -> dict[str, Any]:
    """Loading info by transformers for tensors of these names and shapes, on the meta device and without contents."""
    state = {
        name: torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
        for name, info in files.tensors.items()
    }
    doing = "fit the weights to the model that config.json describes"
    with over_files(files.directory, doing, SAME_RUN), without_report():
        _, info = type(skeleton).from_pretrained(  # type: ignore[attr-defined]
            None,
            config=skeleton.config,
            state_dict=state,
            device_map={"": "meta"},
            key_mapping=key_mapping(prefix),
            ignore_mismatched_sizes=True,  # peel's own message names the tensor and both shapes
            output_loading_info=True,
        )
    return dict(info)


def _is_ignored(skeleton: nn.Module, forms: set[str]) -> bool:
    """Whether the model family lists one of these names as a tensor to ignore on loading."""
    patterns = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, form) for pattern in patterns for form in forms)


def _require_shapes(files: CheckpointFiles, mismatched: Any) -> None:
    for name, found, wanted in sorted(mismatched, key=lambda entry: str(entry[0])):
        here, there = list(found), list(wanted)
        if 0 in here:
            raise CheckpointError(
                f"{files.directory}: the weight {name!r} has shape {here}, and config.json calls for {there}: it is "
                "empty, as DeepSpeed's ZeRO-3 leaves what save_pretrained writes without gathering. Merge the shards "
                "with DeepSpeed's zero_to_fp32.py, then save_pretrained"
            )
        in_block = any(part.isdigit() for part in str(name).split("."))
        hint = "" if in_block else " A vocabulary that was resized needs its new vocab_size in config.json."
        raise CheckpointError(
            f"{files.directory}: the weight {name!r} has shape {here}, and config.json calls for {there}. "
            f"{SAME_RUN}{hint}"
        )


def _require_names(files: CheckpointFiles, prefix: str, info: dict[str, Any]) -> None:
    missing = sorted(map(str, info["missing_keys"]))
    left_over = sorted(
        name
        for name, tensor in files.tensors.items()
        if len(tensor.shape) >= 2 and {name, renamed(name, prefix)} & set(info["unexpected_keys"])
    )
    if missing:
        found = f"; of those that are there, {left_over[0]!r} is none of the model's" if left_over else ""
        raise CheckpointError(
            f"{files.directory}: {len(missing)} weights that config.json calls for are not in the checkpoint, such as "
            f"{missing[0]!r}{found}. {SAME_RUN} Else copy the checkpoint again, or save it with save_pretrained."
        )
    if prefix and left_over:
        raise CheckpointError(
            f"{files.directory}: the tensors' names begin with {prefix!r}. Without it they fit the model, but "
            f"{len(left_over)} are left over, such as {left_over[0]!r}. Save the language model alone with "
            "save_pretrained"
        )
