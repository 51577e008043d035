"""The HDF5 files of fitted references: one part per layer while a fit goes on, one `fit.h5` when it is whole.

    /references/<key>                     attributes `reference`, `fit` (JSON)
    /references/<key>/nll_select, nll_eval, kl_eval    (n_seq,) float64; in the finished file only
    /references/<key>/weights/<i>         attributes `name`, `shape`, `scheme`, `group_size`, `transposed`;
        packed, scale                     codes at their true size (uint8) and steps (float32),
        zero_point                        codes of weight 0 (int8), where the scheme is not symmetric, or
        plain                             the parameter as it is (schemes fp, kind challenge), or
        factors                           of equal parts of the checkpoint's matrix along attribute `dim` (kind rescale)
    /ids_eval                             (n_eval, seq_len) int32
    /paths                                the peeled paths, laid out in `paths`
    /trained/nll_select, nll_eval, entropy_eval        (n_seq,) of the checkpoint itself

Witnesses live here: what is stored is exactly what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peelcli.records import Run
from peelcli.storage.fit_reader import HOLDS_PATHS, HOLDS_REFERENCES, SCHEMA, SCHEMA_VERSION, name_of
from peelcli.storage.hdf5 import open_h5, open_plain, put_array, put_attribute, require_ids, write_root
from peelcli.storage.path_parts import PathParts, write_paths
from peelcli.storage.replacement_weights import copy_witness, replacing


def read_eval_ids(path: Path) -> Tensor:
    """The token ids (n_eval, seq_len) of `eval`, on which the losses of a fit were measured."""
    with open_h5(path, SCHEMA, SCHEMA_VERSION) as file:
        about, (n_eval,) = (
            file.root.json("about"),
            file.root.group("trained").rows("nll_eval", ("float64",)).shape,
        )
        ids = file.root.array("ids_eval", ("int32",), (n_eval, None))
        with file.reading("ids_eval"):
            require_ids(ids, int(about["vocab_size"]), int(about["seq_len"]))
        return torch.from_numpy(ids.astype(np.int64))


def write_fit(
    path: Path, run: Run, ids: Tensor, parts: Mapping[str, Path], path_parts: PathParts | None = None
) -> None:
    """Write the finished fit: everything that a report needs, and the weights and ids to measure it again.

    ids: token ids of `eval`, (n_eval, seq_len). parts: reference key → part file with its weights. path_parts: the
    part files of `run.paths`.
    """
    about = {f.name: getattr(run, f.name) for f in fields(run) if f.name not in _ARRAYS}
    about["findings"] = [asdict(f) for f in run.findings]
    about["quantized"] = None if run.quantized is None else asdict(run.quantized)
    about[HOLDS_REFERENCES] = [score.reference.key for score in run.scores]
    about[HOLDS_PATHS] = []
    if run.paths is not None and path_parts is not None:
        about[HOLDS_PATHS] = [name_of(score.target_map) for score in (run.paths.control, *run.paths.scores)]
    with replacing(path) as file:
        write_root(file, SCHEMA, SCHEMA_VERSION, about, run.config)
        trained = file.create_group("trained")
        for name in ("nll_select", "nll_eval", "entropy_eval"):
            put_array(trained, name, np.array(getattr(run, name), dtype=np.float64))
        put_array(file, "ids_eval", ids.numpy().astype(np.int32))
        group = file.create_group("references", track_order=True)
        for score in run.scores:
            one = group.create_group(score.reference.key)
            put_attribute(one, "reference", json.dumps(asdict(score.reference)))
            put_attribute(one, "fit", json.dumps(asdict(score.fit)))
            for name in ("nll_select", "nll_eval", "kl_eval"):
                put_array(one, name, np.array(getattr(score, name), dtype=np.float64))
            if score.reference.key in parts:
                with open_plain(parts[score.reference.key]) as part:
                    copy_witness(part.root.group("references").group(score.reference.key), one)
        if run.paths is not None and path_parts is not None:
            write_paths(file, run.paths, path_parts)


_ARRAYS = {"scores", "paths", "nll_select", "nll_eval", "entropy_eval"}
