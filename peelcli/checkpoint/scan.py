"""Read every tensor of a checkpoint once, before any model is built, to find damaged and duplicate layers.

One tensor, or one slice of it, is in memory at a time, so a checkpoint may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from peelcli.checkpoint.files import FORMATS, CheckpointFiles, TensorInfo, read_tensor
from peelcli.checkpoint.layers import group_by_layer
from peelcli.records import Finding
from peelcli.records.progress import Progress

# Bytes read at a time: small relative to any model, large enough that the cost of a call does not matter.
SLICE_BYTES = 64 * 2**20

_Read = Callable[[str, "slice | None"], torch.Tensor]

# Config keys that do not describe the architecture: they change with the machine or the library version.
_INCIDENTAL = (
    "architectures",
    "auto_map",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
    "use_cache",
)


@dataclass(frozen=True)
class ScanResult:
    """What the files of one checkpoint hold. Layers count from 1; hashes are hexadecimal SHA-256.

    `layer_hashes` is empty if the layers could not be identified by name; a finding says so. Parameters are counted as
    stored: packed weights by their packed elements, and a tied tensor that was written twice counts twice.
    """

    directory: str
    checkpoint_id: str  # 16 hexadecimal digits over all tensors, their names and the architecture
    tensor_hashes: dict[str, str]
    layer_hashes: dict[int, str]
    findings: tuple[Finding, ...]
    num_parameters: int
    layer_num_parameters: dict[int, int]
    total_nbytes: int
    num_tensors: int


@dataclass(frozen=True)
class _Contents:
    digest: str
    num_nan: int = 0
    num_inf: int = 0
    constant: float | None = None  # the value of all elements, if they are equal


def run_scan(
    files: CheckpointFiles,
    num_layers: int | None = None,
    no_weights: Collection[str] = (),
    findings: Sequence[Finding] = (),
) -> Generator[Progress, None, ScanResult]:
    """Hash every tensor and check the floating-point ones, yielding the bytes read.

    num_layers: overrides the config. no_weights: tensors whose values are not checked, because the model does not use
    them as weights, such as a causal mask of −inf. findings: earlier findings, which the result includes.

    A tensor's hash covers dtype, shape and bytes, so it does not depend on file format or sharding. A layer's hash
    covers its tensors, sorted by their names within the layer. Kinds of findings: "non-finite", "constant",
    "duplicate-layer", "shared-layers", "surplus-layers", "layers-unknown". Raises CheckpointError if a layer lacks a
    tensor, or a file cannot be read.
    """
    layers, on_layers = group_by_layer(files, num_layers)
    found = [*files.findings, *findings, *on_layers]
    layer_of = {info.name: layer for layer, members in layers.items() for info in members.values()}
    hashes: dict[str, str] = {}
    total, done = sum(info.nbytes for info in files.tensors.values()), 0
    for file, batch in _batches(files):
        with FORMATS[files.format].opened(file) as read:
            for info in batch:
                contents = _examine(info, read)
                hashes[info.name] = contents.digest
                if info.name not in no_weights:
                    found += _judge(info, contents, layer_of.get(info.name))
                done += info.nbytes
                yield Progress("scan", done, total, info.name)
    layer_hashes = {
        layer: _hash_names({relative: hashes[info.name] for relative, info in members.items()})
        for layer, members in layers.items()
    }
    return ScanResult(
        directory=str(files.directory),
        checkpoint_id=_hash_names(hashes, _architecture(files.config))[:16],
        tensor_hashes=hashes,
        layer_hashes=layer_hashes,
        findings=(*found, *_duplicates(layer_hashes, files.config)),
        num_parameters=sum(info.numel for info in files.tensors.values()),
        layer_num_parameters={n: sum(i.numel for i in members.values()) for n, members in layers.items()},
        total_nbytes=total,
        num_tensors=len(hashes),
    )


def scan(files: CheckpointFiles, num_layers: int | None = None) -> ScanResult:
    """The result of `run_scan`, without progress."""
    steps = run_scan(files, num_layers)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(ScanResult, end.value)


def _batches(files: CheckpointFiles) -> Iterator[tuple[Path, list[TensorInfo]]]:
    """Split the tensors into batches from one file, in its order, of about SLICE_BYTES each."""
    batch: list[TensorInfo] = []
    size = 0
    for info in files.tensors.values():
        if batch and (info.file != batch[0].file or size + info.nbytes > SLICE_BYTES):
            yield batch[0].file, batch
            batch, size = [], 0
        batch.append(info)
        size += info.nbytes
    if batch:
        yield batch[0].file, batch


def _pieces(info: TensorInfo, read: _Read) -> Iterator[torch.Tensor]:
    """The tensor's elements in their order, flat, at most SLICE_BYTES at a time."""
    rows = info.shape[0] if info.shape else 1
    step = max(1, SLICE_BYTES * rows // max(info.nbytes, 1))
    for start in range(0, rows, step):
        # A large tensor is opened again for each slice, so that the memory of the previous slice is released.
        part = read(info.name, None) if step >= rows else read_tensor(info, slice(start, start + step))
        flat = part.contiguous().reshape(-1)
        # One row of stacked experts can be larger than a slice.
        yield from flat.split(max(1, SLICE_BYTES // flat.element_size()))


def _examine(info: TensorInfo, read: _Read) -> _Contents:
    digest = hashlib.sha256(f"{info.dtype}{list(info.shape)}".encode())
    num_nan = num_inf = 0
    low, high = float("inf"), float("-inf")
    for piece in _pieces(info, read):
        digest.update(piece.view(torch.uint8).numpy().data)
        values = _values(piece)
        if values is None or not values.numel():
            continue
        # One pass, without a temporary: both ends are NaN where any element is.
        ends = [float(end) for end in values.aminmax()]
        if all(map(math.isfinite, ends)):
            low, high = min(low, ends[0]), max(high, ends[1])
        else:
            num_nan += int(values.isnan().sum())
            num_inf += int(values.isinf().sum())
    constant = low if low == high and info.numel > 1 and not num_nan + num_inf else None
    return _Contents(digest.hexdigest(), num_nan, num_inf, constant)


def _values(piece: torch.Tensor) -> torch.Tensor | None:
    """The real numbers in a piece; None for integers and packed weights, in which any bytes are valid."""
    if piece.is_complex():
        return torch.view_as_real(piece)
    if not piece.dtype.is_floating_point or str(piece.dtype).startswith("torch.float4"):
        return None
    return piece.to(torch.float32) if piece.element_size() == 1 else piece  # torch reduces no 8-bit floats


def _judge(info: TensorInfo, contents: _Contents, layer: int | None) -> list[Finding]:
    where = f"tensor {info.name!r}" + (f" (layer {layer})" if layer else "")
    if contents.num_nan or contents.num_inf:
        message = (
            f"{where} holds {contents.num_nan:,} NaN and {contents.num_inf:,} infinite of {info.numel:,} "
            "values: training diverged or the file is damaged; go back to an earlier checkpoint"
        )
        return [Finding("non-finite", message, layer, info.name)]
    if contents.constant is not None and len(info.shape) >= 2:
        message = (
            f"{where}, of shape {list(info.shape)}, is {contents.constant:g} throughout: it was never "
            "trained, or never written"
        )
        return [Finding("constant", message, layer, info.name)]
    return []


def _duplicates(layer_hashes: Mapping[int, str], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings about copied layers: one note for layers shared by design, and a fault for any other copy."""
    shared = _shared_layers(layer_hashes, config)
    if shared:
        pairs = ", ".join(f"{layer} is {earlier}" for layer, earlier in list(shared.items())[:4])
        more = " …" if len(shared) > 4 else ""
        message = (
            f"{len(shared)} of {len(layer_hashes)} layers repeat earlier ones, byte for byte and in their order "
            f"({pairs}{more}): the network shares blocks, or was made deeper by copying and not trained since"
        )
        yield Finding("shared-layers", message)
    first: dict[str, int] = {}
    for layer, digest in layer_hashes.items():
        earlier = first.setdefault(digest, layer)
        if earlier != layer and layer not in shared:
            message = (
                f"layer {layer} is, byte for byte, layer {earlier}: copied in depth up-scaling and not "
                "trained since, or written twice by a faulty conversion"
            )
            yield Finding("duplicate-layer", message, layer=layer)


def _shared_layers(layer_hashes: Mapping[int, str], config: Mapping[str, Any]) -> dict[int, int]:
    """Layer → earlier layer that it copies by design.

    Copies are by design if the config has fewer groups than layers, or if two or more consecutive layers repeat the
    same number of earlier layers in order. A fault writes a single layer twice, and no such pattern.
    """
    groups = config.get("num_hidden_groups")
    by_config = isinstance(groups, int) and 0 < groups < len(layer_hashes)
    least = 1 if by_config else 2
    shared: dict[int, int] = {}
    layers = sorted(layer_hashes)
    for distance in range(1, len(layers)):
        run: list[int] = []
        for layer in [*layers[distance:], None]:
            if layer is not None and layer_hashes[layer] == layer_hashes.get(layer - distance):
                run.append(layer)
                continue
            if len(run) >= least:
                shared.update({copy: copy - distance for copy in run if copy not in shared})
            run = []
    return shared


def _hash_names(hashes: dict[str, str], *more: str) -> str:
    return hashlib.sha256(json.dumps([sorted(hashes.items()), *more]).encode()).hexdigest()


def _architecture(config: dict[str, Any]) -> str:
    """The config as canonical JSON, without keys that do not change the network."""

    def prune(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: prune(v) for k, v in value.items() if k not in _INCIDENTAL and not k.startswith("_")}
        return [prune(v) for v in value] if isinstance(value, list) else value

    return json.dumps(prune(config), sort_keys=True)
