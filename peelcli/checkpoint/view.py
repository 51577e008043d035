"""Make a temporary directory for transformers to load from: links to the weights, and an index written by peel.

So no other file of the checkpoint has an effect, such as generation_config.json, an adapter, or an index without
metadata. If a tensor is in several shards, the valid copy is written to its own file, which transformers reads last.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn, save

from peelcli.checkpoint.files import CheckpointFiles, read_tensor

_LAST = "model-overlaid"  # sorts after "model-00001…"; transformers reads shards in the order of their names


@contextlib.contextmanager
def as_transformers_reads(files: CheckpointFiles, parent: Path) -> Iterator[Path]:
    """A temporary directory below `parent` with links to the weights of `files`; it is deleted after the context."""
    parent.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", ".safetensors") if files.format == "safetensors" else ("pytorch_model", ".bin")
    with tempfile.TemporaryDirectory(prefix="view-", dir=parent) as name:
        directory = Path(name)
        (directory / "generation_config.json").write_text("{}", encoding="utf-8")  # peel does not generate
        if len(files.files) == 1:
            (directory / f"{stem}{suffix}").symlink_to(files.files[0].resolve())
        else:
            weight_map = _links(files, directory, suffix)
            index = {"metadata": {}, "weight_map": weight_map}
            (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
        yield directory


def _links(files: CheckpointFiles, directory: Path, suffix: str) -> dict[str, str]:
    """Link every shard into `directory`; returns the name of the file there that holds each tensor."""
    links = {file: f"model-{number:05d}{suffix}" for number, file in enumerate(files.files, start=1)}
    for file, link in links.items():
        (directory / link).symlink_to(file.resolve())
    weight_map = {name: links[info.file] for name, info in files.tensors.items()}
    if files.overlaid:
        tensors = {name: read_tensor(files.tensors[name]).clone() for name in files.overlaid}
        target = directory / f"{_LAST}{suffix}"
        if suffix == ".safetensors":
            save_file(tensors, target, metadata={"format": "pt"})
        else:
            save(tensors, target)
        weight_map |= dict.fromkeys(tensors, target.name)
    return weight_map


def read_from_source(model: nn.Module, files: CheckpointFiles, view: Path) -> None:
    """Redirect accelerate from the links in `view` to the checkpoint's own files, because `view` will be deleted."""
    seen: set[int] = set()
    for module in model.modules():
        index = _offload_index(module)
        if index is None or id(index) in seen:
            continue
        seen.add(id(index))
        for entry in index.values():
            file = entry.get("safetensors_file")
            if file is not None and Path(file).parent == view:
                entry["safetensors_file"] = str(files.tensors[entry["weight_name"]].file)


def _offload_index(module: nn.Module) -> dict[str, dict[str, Any]] | None:
    """Accelerate's table of weight files for a module, which all modules of a model share; None if there is none."""
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    index = getattr(getattr(weights, "dataset", None), "index", None)
    return index if isinstance(index, dict) else None
