"""The weights of a checkpoint's blocks, one block at a time, as the newest transformers names and shapes them.

transformers maps the blocks to "disk": safetensors are read in place, and what must be converted first (pickles, the
experts of a mixture) is written to a folder once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from peelcli.checkpoint.structure import find_blocks, num_hidden_layers
from peelcli.errors import CheckpointError

_PREFIXES = {r"^_orig_mod\.": "", r"^module\.": ""}


def _skeleton(directory: Path) -> tuple[Any, nn.Module, str]:
    """The config, the model it describes without any weights, and the name of its blocks."""
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{directory}: transformers cannot build this model as a causal language model: {error}. "
            "peel audits decoder-only models of families that transformers knows; remote code is never run."
        ) from error
    return config, skeleton, find_blocks(skeleton, num_hidden_layers(config))


def block_shapes(directory: Path) -> list[dict[str, torch.Size]]:
    """Shapes of every block's parameters by their names within the block, as config.json calls for them."""
    _, skeleton, blocks = _skeleton(directory)
    return [_shapes(block) for block in skeleton.get_submodule(blocks).children()]


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in block.named_parameters()}


def load_model(
    directory: Path, *, dtype: torch.dtype, device: str, offload_dir: Path
) -> tuple[Any, nn.Module, str]:
    """The config, the model with its blocks on disk and the rest on `device` (may be "disk"), and the blocks' name.

    Raises CheckpointError where transformers cannot build the model, or the weights are not those it calls for.
    """
    config, skeleton, blocks = _skeleton(directory)
    mapping = _device_map(skeleton, blocks, device)
    del skeleton
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map=mapping,
            offload_folder=str(offload_dir),
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            key_mapping=dict(_PREFIXES),
            output_loading_info=True,
        )
    except (ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{directory}: the weights do not fit the model that config.json describes: {error}. "
            "Check that config.json and the weights come from the same run."
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} weights that config.json calls for are not in the checkpoint, such as "
            f"{missing[0]!r}. Copy the checkpoint again, or save it with save_pretrained."
        )
    return config, model, blocks


def _device_map(model: nn.Module, blocks: str, device: str) -> dict[str, str]:
    """Blocks on disk, everything else on `device`: one entry for each part beside the path to the blocks."""
    mapping: dict[str, str] = {}
    path = blocks.split(".")
    for depth, step in enumerate(path):
        parent = model.get_submodule(".".join(path[:depth]))
        prefix = ".".join(path[:depth]) + "." if depth else ""
        mapping.update({prefix + n: device for n, _ in parent.named_children() if n != step})
        mapping.update({prefix + n: device for n, _ in parent.named_parameters(recurse=False)})
        mapping.update({prefix + n: device for n, _ in parent.named_buffers(recurse=False)})
    container = model.get_submodule(blocks)
    mapping.update({f"{blocks}.{i}": "disk" for i, _ in enumerate(container.children())})
    return mapping


class BlockWeights:
    """Reads the parameters of one block at a time. Layers count from 1."""

    def __init__(self, blocks: Sequence[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
        """Take `blocks`, of a model that `load_model` gave, out of accelerate's hands."""
        self._dtype, self._device = dtype, device
        self._shapes = [_shapes(block) for block in blocks]
        self._readers = [_detach(block, layer) for layer, block in enumerate(blocks, start=1)]

    def names(self, layer: int) -> tuple[str, ...]:
        """Names of one block's parameters, relative to the block."""
        return tuple(self._readers[layer - 1])

    def read(self, layer: int) -> dict[str, Tensor]:
        """The parameters of one block by those names, on the device and in the dtype it runs in.

        Raises CheckpointError where one has not the shape that config.json calls for: transformers does not look at
        what it leaves on disk.
        """
        weights = {}
        for name, read in self._readers[layer - 1].items():
            value, expected = read(), self._shapes[layer - 1][name]
            if value.shape != expected:
                raise CheckpointError(
                    f"layer {layer}: the weight {name!r} has shape {list(value.shape)}, and config.json calls for "
                    f"{list(expected)}. Check that config.json and the weights come from the same run."
                )
            weights[name] = value.to(device=self._device, dtype=self._dtype)
        return weights


def open_weights(directory: Path, *, dtype: torch.dtype, offload_dir: Path) -> BlockWeights:
    """The blocks of a checkpoint that is not to be run: nothing of it stays in memory, embeddings and head included.

    `offload_dir` takes what cannot be read in place. Raises CheckpointError as `load_model` does.
    """
    _, model, blocks = load_model(directory, dtype=dtype, device="disk", offload_dir=offload_dir)
    return BlockWeights(list(model.get_submodule(blocks).children()), dtype, torch.device("cpu"))


def _detach(block: nn.Module, layer: int) -> Mapping[str, Callable[[], Tensor]]:
    """Take a block out of accelerate's hands; return how to read each of its parameters."""
    readers: dict[str, Callable[[], Tensor]] = {}
    for name, module in block.named_modules():
        hook = getattr(module, "_hf_hook", None)
        weights_map = getattr(hook, "weights_map", None)
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            if weights_map is not None and parameter.device.type == "meta":
                readers[full] = partial(weights_map.__getitem__, key)
            elif parameter.device.type != "meta":
                readers[full] = partial(_same, parameter.data)
            else:
                raise CheckpointError(
                    f"layer {layer}: the weight {full!r} was not loaded from the checkpoint"
                )
    remove_hook_from_module(block, recurse=True)
    return readers


def _same(value: Tensor) -> Tensor:
    return value
