"""Read the weights of a checkpoint one block at a time, with the names and shapes of the installed transformers.

transformers maps the blocks to "disk". Safetensors are read in place. Weights that must be converted first (pickles,
the experts of a mixture) are written to a folder once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peelcli.checkpoint import pickle_format, safetensors_format
from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.library import over_files
from peelcli.checkpoint.offload import PrivateDirectory
from peelcli.checkpoint.plain import quantized_modules, unpack
from peelcli.checkpoint.reading import StoredTensor, transformers_unmapped
from peelcli.checkpoint.running import AS_STORED, Running
from peelcli.checkpoint.skeleton import SAME_RUN, build_skeleton, rehearse
from peelcli.checkpoint.stamp import UNSTAMPED, Stamp
from peelcli.checkpoint.structure import find_matrices
from peelcli.checkpoint.view import as_transformers_reads, read_from_source
from peelcli.errors import CheckpointError
from peelcli.records import QuantizedModule


def block_shapes(directory: Path) -> list[dict[str, torch.Size]]:
    """For each block, parameter name within the block → shape by config.json."""
    _, skeleton, blocks = build_skeleton(open_checkpoint(directory))
    return [_shapes(block) for block in skeleton.get_submodule(blocks).children()]


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in block.named_parameters()}


def load_model(
    directory: Path, *, dtype: torch.dtype, device: str, offload_dir: Path
) -> tuple[Any, nn.Module, str, tuple[str, ...]]:
    """Load a model with its blocks on disk and the rest on `device` (may be "disk").

    Returns the config, the model, the name of its list of blocks, and the sorted names of tensors that the model does
    not use. Raises CheckpointError if transformers cannot build the model, or if the weights do not fit it.
    """
    files = open_checkpoint(directory)
    config, skeleton, blocks = build_skeleton(files)
    fit = rehearse(files, skeleton)
    mapping = _device_map(skeleton, blocks, device)
    del skeleton
    own = PrivateDirectory(offload_dir)
    with (
        as_transformers_reads(files, own.path) as view,
        transformers_unmapped(safetensors_format.stored_tensors, pickle_format.stored_tensors),
        over_files(directory, "load the weights into the model that config.json describes", SAME_RUN),
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            view,
            config=config,
            dtype=dtype,
            device_map=mapping,
            offload_folder=str(own.path),
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            key_mapping=fit.key_mapping,
            output_loading_info=True,
        )
        model, info = loaded
        read_from_source(model, files, view)
    own.keep_for(list(model.get_submodule(blocks).modules()))
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} weights that config.json calls for are not in the checkpoint, such as "
            f"{missing[0]!r}. Copy the checkpoint again, or save it with save_pretrained."
        )
    return config, model, blocks, tuple(sorted(info["unexpected_keys"]))


def _device_map(model: nn.Module, blocks: str, device: str) -> dict[str, str]:
    """Map blocks to disk and everything else to `device`, with one entry for each module outside the blocks."""
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
    """Reads the parameters of one block at a time, in the precision in which they run. Layers count from 1."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        dtype: torch.dtype,
        device: torch.device,
        running: Running = AS_STORED,
        name: str = "",
        stamp: Stamp = UNSTAMPED,
    ) -> None:
        """Detach `blocks`, of a model from `load_model`, from accelerate.

        name: of the list of blocks in the model. stamp: the state of the checkpoint's files when they were found.
        """
        self._stamp = stamp
        self._dtype, self._device, self._running, self.list_name = dtype, device, running, name
        self._shapes = [_shapes(block) for block in blocks]
        self._readers = [_detach(block, layer) for layer, block in enumerate(blocks, start=1)]
        self._matrices = [{m.name: m for m in find_matrices(block)} for block in blocks]
        self.rounded: dict[str, QuantizedModule] = {}  # how the latent weights read so far are quantised

    def names(self, layer: int) -> tuple[str, ...]:
        """Names of one block's parameters, relative to the block."""
        return tuple(self._readers[layer - 1])

    def matrices(self, layer: int) -> tuple[str, ...]:
        """Names, among those, of the matrices that a scheme applies to."""
        return tuple(self._matrices[layer - 1])

    def module_name(self, layer: int, matrix: str) -> str:
        """The full name of the module that holds a matrix of a block."""
        return f"{self.list_name}.{layer - 1}.{matrix.removesuffix('.weight')}"

    def read(self, layer: int) -> dict[str, Tensor]:
        """The parameters of one block by those names, on the device and in the dtype it runs in.

        Raises CheckpointError if a parameter's shape contradicts config.json, because transformers does not check
        weights that it leaves on disk. Raises CheckpointChangedError if a file of the checkpoint has changed, so that
        one result is never computed from two versions of the weights.
        """
        with self._stamp.watched():
            weights = {name: self._read(layer, name) for name in self._readers[layer - 1]}
            self._stamp.require_unchanged()
        return weights

    def _read(self, layer: int, name: str) -> Tensor:
        value, expected = self._readers[layer - 1][name](), self._shapes[layer - 1][name]
        if value.shape != expected:
            raise CheckpointError(
                f"layer {layer}: the weight {name!r} has shape {list(value.shape)}, and config.json calls for "
                f"{list(expected)}. Check that config.json and the weights come from the same run."
            )
        return self._as_it_runs(layer, name, value.to(self._device)).to(dtype=self._dtype)

    def is_rounded(self, layer: int, matrix: str) -> bool:
        """Whether a matrix is stored as a latent weight, and rounded when it is read."""
        latent = self._running.latent
        return (
            latent is not None
            and matrix in self._matrices[layer - 1]
            and latent.selects(self.module_name(layer, matrix), True)
        )

    def _as_it_runs(self, layer: int, name: str, value: Tensor) -> Tensor:
        latent = self._running.latent
        if latent is None or not self.is_rounded(layer, name):
            return value
        transposed, module = self._matrices[layer - 1][name].transposed, self.module_name(layer, name)
        value = value.transpose(-1, -2) if transposed else value
        value, self.rounded[module] = latent.rounded(module, layer, value)
        return value.transpose(-1, -2).contiguous() if transposed else value


def open_weights(
    directory: Path,
    *,
    dtype: torch.dtype,
    offload_dir: Path,
    running: Running = AS_STORED,
    stamp: Stamp = UNSTAMPED,
) -> BlockWeights:
    """The blocks of a checkpoint that will not be run. Nothing stays in memory, not even embeddings and head.

    offload_dir: where weights are written that cannot be read in place. Raises CheckpointError as `load_model` does,
    and CheckpointChangedError if the files have changed since `stamp`.
    """
    with stamp.watched():
        plain = plain_directory(directory, dtype, offload_dir, running)
        _, model, blocks, _ = load_model(plain, dtype=dtype, device="disk", offload_dir=offload_dir)
        stamp.require_unchanged()
    modules = list(model.get_submodule(blocks).children())
    return BlockWeights(modules, dtype, torch.device("cpu"), running, blocks, stamp)


def plain_directory(directory: Path, dtype: torch.dtype, offload_dir: Path, running: Running) -> Path:
    """The directory with unpacked tensors: the checkpoint's own, or the one that a packed checkpoint is unpacked to."""
    if running.packing is None:
        return directory
    return unpack(open_checkpoint(directory), running.packing, dtype, offload_dir)


def unpacked_modules(plain: Path, running: Running) -> dict[str, QuantizedModule]:
    """How packed weights were quantised, by the module's name in the files; {} if nothing is packed."""
    return {} if running.packing is None else {module.name: module for module in quantized_modules(plain)}


def _detach(block: nn.Module, layer: int) -> Mapping[str, Callable[[], Tensor]]:
    """Detach a block from accelerate; returns parameter name → function that reads the parameter."""
    readers: dict[str, Callable[[], Tensor]] = {}
    tables: dict[str, Mapping[str, StoredTensor]] = {}  # of the files that the block's weights lie in
    for name, module in block.named_modules():
        hook = getattr(module, "_hf_hook", None)
        weights_map = getattr(hook, "weights_map", None)
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            if weights_map is not None and parameter.device.type == "meta":
                readers[full] = _reader(weights_map, key, tables)
            elif parameter.device.type != "meta":
                readers[full] = partial(_same, parameter.data)
            else:
                raise CheckpointError(
                    f"layer {layer}: the weight {full!r} was not loaded from the checkpoint"
                )
    remove_hook_from_module(block, recurse=True)
    return readers


def _reader(
    weights_map: PrefixedDataset, key: str, tables: dict[str, Mapping[str, StoredTensor]]
) -> Callable[[], Tensor]:
    """A function that reads a weight left on disk with plain reads; accelerate would map the file into memory."""
    index = weights_map.dataset.index
    place = index.get(weights_map.prefix + key, {})
    file, name = place.get("safetensors_file"), place.get("weight_name", weights_map.prefix + key)
    if file is None:
        return partial(weights_map.__getitem__, key)
    if file not in tables:
        tables[file] = safetensors_format.stored_tensors(Path(file))
    stored = tables[file][name]
    # The reader keeps `weights_map` alive: the directory of converted weights is deleted with it.
    return partial(_read_stored, stored, getattr(torch, place.get("dtype", stored.dtype)), weights_map)


def _read_stored(stored: StoredTensor, dtype: torch.dtype, _: object) -> Tensor:
    return stored.read().to(dtype)


def _same(value: Tensor) -> Tensor:
    return value
