"""Peeled paths in HDF5: one part for each fitted block and each finished map, and a group of the finished fit.

/paths                                attribute `about` (JSON): schemes, left_out, num_fits, seconds
/paths/control, /paths/1-3-3-4        attribute `score` (JSON): target_map, fits, unexplained
    nll_select, nll_eval              (n_seq,) float64
    head                              (d_model, d_model) float32, the map before the head's matrix
    blocks/001, …                     the weights of each layer's block, as `storage` lays them out; only of the
                                      maps that a verdict can rest on
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from peelcli.errors import ArtefactError
from peelcli.records import Paths, PathScore
from peelcli.references.interface import Replacement
from peelcli.storage.fit_reader import SCHEMA, SCHEMA_VERSION, name_of, read_path_score
from peelcli.storage.hdf5 import open_h5, open_plain, put_array, put_attribute, put_text
from peelcli.storage.hdf5_reader import Group
from peelcli.storage.replacement_weights import copy_witness, key_digest, read_weights, replacing


def part_name(kind: str, target_map: Sequence[int]) -> str:
    """The file name of a part. It is a hash, because the targets of many layers exceed the length of a file name."""
    return f"{kind}-{hashlib.sha256(name_of(target_map).encode()).hexdigest()[:16]}.h5"


def write_path_part(path: Path, key: str, score: PathScore, head: Tensor) -> None:
    """Write a finished map: its losses and its head. key: identifies the fit that the part belongs to."""
    with replacing(path, sealed=True) as file:
        put_attribute(file, "key", key_digest(key))
        _write_score(file.create_group("path"), score, head)


def read_path_part(path: Path) -> tuple[PathScore, Tensor]:
    """The losses and the head that `write_path_part` stored."""
    with open_plain(path) as file:
        group = file.root.group("path")
        return read_path_score(group), _read_head(group)


def _read_head(group: Group) -> Tensor:
    head = group.array("head", ("float32",), (None, None))
    with group.stored.reading(f"{group.name}/head"):
        if head.shape[0] != head.shape[1]:
            raise ValueError(f"expected a square matrix, found {head.shape}")
        return torch.from_numpy(head)


def _write_score(group: h5py.Group, score: PathScore, head: Tensor) -> None:
    values = asdict(score)
    for name in ("nll_select", "nll_eval"):
        put_array(group, name, np.array(values.pop(name), dtype=np.float64))
    put_text(group, "score", json.dumps(values))
    put_array(group, "head", head.detach().float().cpu().numpy())


@dataclass(frozen=True)
class PathParts:
    """The part files of the peeled paths: of each map, with () for the control, and of each prefix with kept blocks."""

    maps: Mapping[tuple[int, ...], Path]
    blocks: Mapping[tuple[int, ...], Path]


def write_paths(file: h5py.File, paths: Paths, parts: PathParts) -> None:
    """Write the group /paths of a finished fit, with the weights of maps whose prefixes are all in `parts`."""
    group = file.create_group("paths", track_order=True)
    about = {name: getattr(paths, name) for name in ("schemes", "left_out", "num_fits", "seconds")}
    put_text(group, "about", json.dumps(about))
    for score in (paths.control, *paths.scores):
        one = group.create_group(name_of(score.target_map))
        _write_score(one, score, read_path_part(parts.maps[score.target_map])[1])
        prefixes = [score.target_map[:layer] for layer in range(1, len(score.target_map) + 1)]
        if prefixes and all(prefix in parts.blocks for prefix in prefixes):
            kept = one.create_group("blocks")
            for layer, prefix in enumerate(prefixes, start=1):
                with open_plain(parts.blocks[prefix]) as part:
                    (only,) = part.root.group("references").groups()
                    copy_witness(only[1], kept.create_group(f"{layer:03d}"))


def load_path(path: Path, target_map: Sequence[int]) -> tuple[tuple[Replacement, ...], Tensor]:
    """The blocks of layers 1…K (none for the control) and the head of a peeled path."""
    name = name_of(target_map)
    with open_h5(path, SCHEMA, SCHEMA_VERSION) as file:
        paths = file.root.group("paths")
        if name not in paths or (target_map and "blocks" not in paths.group(name)):
            raise ArtefactError(f"{path}: holds no weights of the path {name}; fit again.")
        group = paths.group(name)
        blocks: tuple[Replacement, ...] = ()
        if target_map:
            kept = group.group("blocks")
            blocks = tuple(read_weights(kept.group(f"{n:03d}")) for n in range(1, len(target_map) + 1))
        return blocks, _read_head(group)
