"""Write a copy of a checkpoint with some weights replaced, shard by shard. The source is never changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from peelcli.checkpoint.files import CheckpointFiles, read_tensor
from peelcli.checkpoint.stamp import UNSTAMPED, Stamp
from peelcli.errors import BusyError, CheckpointError, UsageError
from peelcli.runtime import durable
from peelcli.runtime.locks import Lock

_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.md")
Replace = Callable[[Tensor], Tensor]


def write_copy(
    files: CheckpointFiles,
    replacements: Mapping[str, Replace],
    output: Path,
    companions: Path | None = None,
    config: Mapping[str, object] | None = None,
    stamp: Stamp = UNSTAMPED,
) -> None:
    """Copy the checkpoint `files` to the new directory `output`, with some tensors replaced.

    replacements: tensor name → function from the stored tensor to the new one.
    companions: directory of the tokenizer and other small files, if it is not the checkpoint's.
    config: the config.json to write; None copies the checkpoint's.
    stamp: the state of the source files when they were opened.

    Tensors stay in the same shards, written as safetensors. The directory gets its final name once it is complete.
    Raises UsageError if `output` exists, BusyError if another process writes it, CheckpointError if a name is unknown,
    and CheckpointChangedError if a source file has changed since `stamp`.
    """
    unknown = sorted(set(replacements) - set(files.tensors))
    if unknown:
        raise CheckpointError(
            f"{files.directory}: holds no tensor {unknown[0]!r}, so nothing can be put in its place. To repair the "
            "model, load it with transformers and change the layer there."
        )
    if output.exists():
        raise UsageError(f"{output}: exists already; name a new directory with --output")
    lock = Lock(output)
    if not lock.take():
        raise BusyError(f"{output}: another peel process{lock.holder()} is writing it; name another --output")
    with lock:
        if output.exists():
            raise UsageError(f"{output}: exists already; name a new directory with --output")
        partial = output.with_name(output.name + ".partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            with stamp.watched():
                _write(files, replacements, companions or files.directory, partial)
                if config is not None:
                    (partial / "config.json").write_text(
                        json.dumps(config, indent=2) + "\n", encoding="utf-8"
                    )
                stamp.require_unchanged()
            durable.sync_tree(partial)
            durable.take_name(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def take_apart(model: nn.Module, prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that save_pretrained writes for one block: name within the block → tensor.

    prefix: the block's name in the model, with a final dot. weights: name within the block → parameter.
    """
    full = {prefix + name: value for name, value in weights.items()}
    number = prefix.rstrip(".").rpartition(".")[2]
    reverted = revert_weight_conversion(cast(PreTrainedModel, model), full)
    return {name.split(f".{number}.", 1)[-1]: t for name, t in reverted.items()}


def require_same_parts(
    files: CheckpointFiles,
    layer: int,
    parts: Mapping[str, Tensor],
    names: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    """Raise CheckpointError unless `parts`, from `take_apart`, equal the stored tensors of the layer.

    names: name within the block → name in the files. dtype: the dtype in which both are compared.
    """
    for relative, value in parts.items():
        stored = read_tensor(files.tensors[names[relative]]).to(dtype) if relative in names else None
        if stored is None or not torch.equal(stored, value.cpu()):
            raise CheckpointError(
                f"{files.directory}: transformers converts the weights of layer {layer} when it loads them, and taking "
                f"them apart again does not give back {relative!r} as it lies in the files, so peel cannot graft into "
                "this checkpoint. To repair it, load the model with transformers and change the layer there."
            )


def _write(
    files: CheckpointFiles, replacements: Mapping[str, Replace], companions: Path, directory: Path
) -> None:
    for pattern in _COMPANIONS:
        for path in companions.glob(pattern):
            if path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, directory / path.name)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(files.files, start=1):
        name = "model.safetensors"
        if len(files.files) > 1:
            name = f"model-{number:05d}-of-{len(files.files):05d}.safetensors"
        tensors = {}
        for info in (i for i in files.tensors.values() if i.file == shard):
            value = read_tensor(info)
            if info.name in replacements:
                value = replacements[info.name](value)
            tensors[info.name] = value.contiguous().clone()
            weight_map[info.name] = name
        save_file(tensors, directory / name, metadata={"format": "pt"})
    if len(files.files) > 1:
        size = sum(info.nbytes for info in files.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
