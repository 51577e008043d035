"""The HDF5 files of fitted references: one part per layer while a fit goes on, one `fit.h5` when it is whole.

    /references/<key>                     attributes `reference`, `fit` (JSON)
    /references/<key>/nll_select, nll_eval, kl_eval    (n_seq,) float64; in the finished file only
    /references/<key>/weights/<i>         attributes `name`, `shape`, `scheme`, `group_size`, `transposed`;
        packed, scale                     codes at their true size (uint8) and steps (float32), or
        plain                             the parameter as it is (schemes fp, kind challenge)
    /ids_eval                             (n_eval, seq_len) int32
    /trained/nll_select, nll_eval, entropy_eval        (n_seq,) of the checkpoint itself

Witnesses live here: what is stored is exactly what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from peelcli.activations import open_h5, read_json, write_root
from peelcli.errors import ArtefactError
from peelcli.quant.packing import pack, unpack
from peelcli.quant.schemes import scheme_named
from peelcli.records import FitOutcome, Reference, Run, Score, run_from
from peelcli.references.interface import QuantizedMatrix, Witness
from peelcli.sink import Sink

SCHEMA, SCHEMA_VERSION = "peel/fit", 1


@contextmanager
def replacing(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file that takes the name `path` only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with closing(Sink(partial, new=True)) as sink:
            with h5py.File(sink, "w") as file:
                yield file
            sink.check()
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _put_plain(group: h5py.Group, value: Tensor) -> None:
    value = value.detach().cpu().contiguous()
    is_bfloat16 = value.dtype == torch.bfloat16
    group.create_dataset("plain", data=(value.view(torch.uint16) if is_bfloat16 else value).numpy())
    group.attrs["torch_dtype"] = str(value.dtype).removeprefix("torch.")


def write_witness(group: h5py.Group, witness: Witness) -> None:
    """Store the weights of a reference, packed, under `group`/weights."""
    weights = group.create_group("weights")
    for name, matrix in witness.quantized.items():
        one = weights.create_group(str(len(weights)))
        one.attrs.update(
            name=name,
            shape=np.array(matrix.codes.shape),
            scheme=matrix.scheme,
            group_size=matrix.group_size or 0,
            transposed=matrix.transposed,
        )
        one.create_dataset("packed", data=pack(matrix.codes, scheme_named(matrix.scheme)).numpy())
        one.create_dataset("scale", data=matrix.scale.float().numpy())
    for name, value in witness.plain.items():
        one = weights.create_group(str(len(weights)))
        one.attrs["name"] = name
        _put_plain(one, value)


def read_witness(group: h5py.Group) -> Witness:
    """The weights of a reference, as `write_witness` stored them."""
    quantized: dict[str, QuantizedMatrix] = {}
    plain: dict[str, Tensor] = {}
    try:
        for one in group["weights"].values():
            name = str(one.attrs["name"])
            if "plain" in one:
                value = torch.from_numpy(one["plain"][...])
                plain[name] = value.view(torch.bfloat16) if one.attrs["torch_dtype"] == "bfloat16" else value
                continue
            scheme = scheme_named(str(one.attrs["scheme"]))
            shape = tuple(int(n) for n in one.attrs["shape"])
            codes = unpack(torch.from_numpy(one["packed"][...]), scheme, shape)
            scale = torch.from_numpy(one["scale"][...])
            size = int(one.attrs["group_size"]) or None
            quantized[name] = QuantizedMatrix(codes, scale, scheme.name, size, bool(one.attrs["transposed"]))
    except (KeyError, ValueError, TypeError, OSError, RuntimeError) as error:
        raise ArtefactError(
            f"{group.file.filename}: the weights of {group.name} are damaged ({error}); fit again."
        ) from error
    return Witness(quantized, plain)


def write_part(path: Path, key: str, results: Mapping[Reference, tuple[Witness, FitOutcome]]) -> None:
    """One layer's fitted references, whole or not at all; `key` says which fit they belong to."""
    with replacing(path) as file:
        file.attrs["key"] = key
        group = file.create_group("references")
        for reference, (witness, outcome) in results.items():
            one = group.create_group(reference.key)
            one.attrs["reference"], one.attrs["fit"] = (
                json.dumps(asdict(reference)),
                json.dumps(asdict(outcome)),
            )
            write_witness(one, witness)


def part_is_whole(path: Path, key: str) -> bool:
    """Whether `path` is a part of the fit that `key` names; parts of another fit are not used."""
    if not path.exists():
        return False
    try:
        with h5py.File(path, "r") as file:
            return file.attrs.get("key") == key
    except OSError:
        return False  # parts are renamed when whole; what cannot be opened is fitted again


def read_part(path: Path) -> dict[Reference, FitOutcome]:
    """The references in a part, without their weights."""
    with h5py.File(path, "r") as file:
        return {_reference(one): _outcome(one) for one in file["references"].values()}


def read_eval_ids(path: Path) -> Tensor:
    """The token ids (n_eval, seq_len) on which the figures of a fit were measured."""
    with open_h5(path, SCHEMA, SCHEMA_VERSION) as file:
        if "ids_eval" not in file:
            raise ArtefactError(f"{path}: holds no token ids to measure on; make it anew with `peel fit`.")
        return torch.from_numpy(file["ids_eval"][...].astype(np.int64))


def load_witness(path: Path, reference: Reference) -> Witness:
    """The weights of one reference, from a part or from a finished fit."""
    with h5py.File(path, "r") as file:
        name = f"references/{reference.key}"
        if name not in file:
            raise ArtefactError(
                f"{path}: no reference {reference.key!r} in this file. Fit again, or name another layer."
            )
        return read_witness(file[name])


def _reference(group: h5py.Group) -> Reference:
    return Reference(**json.loads(group.attrs["reference"]))


def _outcome(group: h5py.Group) -> FitOutcome:
    return FitOutcome(**json.loads(group.attrs["fit"]))


def write_fit(path: Path, run: Run, ids: Tensor, parts: Mapping[str, Path]) -> None:
    """The finished fit: all that a report needs, and what it takes to measure again.

    ids: (n_eval, seq_len) of `eval`. parts: the weights, reference key → part file.
    """
    about = {f.name: getattr(run, f.name) for f in fields(run) if f.name not in _ARRAYS}
    about["findings"] = [asdict(f) for f in run.findings]
    with replacing(path) as file:
        write_root(file, SCHEMA, SCHEMA_VERSION, about, run.config)
        trained = file.create_group("trained")
        for name in ("nll_select", "nll_eval", "entropy_eval"):
            trained.create_dataset(name, data=np.array(getattr(run, name), dtype=np.float64))
        file.create_dataset("ids_eval", data=ids.numpy().astype(np.int32))
        group = file.create_group("references", track_order=True)
        for score in run.scores:
            one = group.create_group(score.reference.key)
            one.attrs["reference"] = json.dumps(asdict(score.reference))
            one.attrs["fit"] = json.dumps(asdict(score.fit))
            for name in ("nll_select", "nll_eval", "kl_eval"):
                one.create_dataset(name, data=np.array(getattr(score, name), dtype=np.float64))
            if score.reference.key in parts:
                with h5py.File(parts[score.reference.key], "r") as part:
                    part.copy(f"references/{score.reference.key}/weights", one)


_ARRAYS = {"scores", "nll_select", "nll_eval", "entropy_eval"}


def key_of(path: Path) -> str | None:
    """Which work a finished fit is the result of."""
    with open_h5(path, SCHEMA, SCHEMA_VERSION) as file:
        key = read_json(file, "config").get("key")
    return key if isinstance(key, str) else None


def read_fit(path: Path) -> Run:
    """The run that `path` holds, with the losses of every reference and none of the weights."""
    with open_h5(path, SCHEMA, SCHEMA_VERSION) as file:
        about = read_json(file, "about")
        try:
            scores = tuple(
                Score(_reference(one), _outcome(one), *(tuple(one[n][...].tolist()) for n in _SCORE_ARRAYS))
                for one in file["references"].values()
            )
            arrays = {
                n: tuple(file["trained"][n][...].tolist()) for n in ("nll_select", "nll_eval", "entropy_eval")
            }
            return run_from(about, scores=scores, **arrays)
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise ArtefactError(f"{path}: damaged ({error}); make it anew with `peel fit`.") from error


_SCORE_ARRAYS = ("nll_select", "nll_eval", "kl_eval")
