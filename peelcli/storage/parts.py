"""Parts: one file for each layer's fitted references, written while a fit goes on, and either complete or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from peelcli.errors import ArtefactError
from peelcli.records import FitOutcome, Reference
from peelcli.references.interface import Replacement
from peelcli.storage.disk_full import is_sealed
from peelcli.storage.fit_reader import outcome_of, reference_of
from peelcli.storage.hdf5 import open_plain, put_attribute
from peelcli.storage.replacement_weights import key_digest, read_weights, replacing, write_weights


def write_part(path: Path, key: str, results: Mapping[Reference, tuple[Replacement, FitOutcome]]) -> None:
    """Write one layer's fitted references to a part. key: identifies the fit that the part belongs to."""
    with replacing(path, sealed=True) as file:
        put_attribute(file, "key", key_digest(key))
        group = file.create_group("references")
        for reference, (replacement, outcome) in results.items():
            one = group.create_group(reference.key)
            put_attribute(one, "reference", json.dumps(asdict(reference)))
            put_attribute(one, "fit", json.dumps(asdict(outcome)))
            write_weights(one, replacement)


def part_is_whole(path: Path, key: str) -> bool:
    """Whether `path` is an undamaged part of the fit `key`. If not, the layer is fitted again."""
    if not is_sealed(path):
        return False
    try:
        with open_plain(path) as file:
            return file.root.has_attribute("key") and file.root.attribute("key", str) == key_digest(key)
    except ArtefactError:
        return False  # parts are renamed when whole; what cannot be read is fitted again


def read_part(path: Path) -> dict[Reference, FitOutcome]:
    """The references in a part, without their weights."""
    with open_plain(path) as file:
        return {reference_of(one): outcome_of(one) for _, one in file.root.group("references").groups()}


def load_weights(path: Path, reference: Reference, device: torch.device | str = "cpu") -> Replacement:
    """The weights of one reference, from a part or a finished fit, on `device`. Raises ArtefactError if missing."""
    with open_plain(path) as file:
        references = file.root.group("references")
        if reference.key not in references:
            raise ArtefactError(
                f"{path}: no reference {reference.key!r} in this file. Fit again, or name another layer."
            )
        return read_weights(references.group(reference.key), device)
