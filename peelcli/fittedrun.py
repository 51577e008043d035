"""A finished fit, read: the run with the losses of every reference and peeled path, and none of the weights. No torch.

What a report needs, so that it starts at once. `fitstore` lays the file out, writes it, and reads its weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py

from peelcli.errors import ArtefactError
from peelcli.h5files import open_h5, read_json
from peelcli.records import FitOutcome, Paths, PathScore, Reference, Run, Score, run_from

SCHEMA, SCHEMA_VERSION = "peel/fit", 1
CONTROL = "control"
_TRAINED_ARRAYS = ("nll_select", "nll_eval", "entropy_eval")
_SCORE_ARRAYS = ("nll_select", "nll_eval", "kl_eval")


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
                Score(
                    reference_of(one), outcome_of(one), *(tuple(one[n][...].tolist()) for n in _SCORE_ARRAYS)
                )
                for one in file["references"].values()
            )
            arrays = {n: tuple(file["trained"][n][...].tolist()) for n in _TRAINED_ARRAYS}
            return run_from(about, scores=scores, paths=_read_paths(file), **arrays)
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise ArtefactError(f"{path}: damaged ({error}); make it anew with `peel fit`.") from error


def reference_of(group: h5py.Group) -> Reference:
    """The reference that a group holds."""
    return Reference(**json.loads(group.attrs["reference"]))


def outcome_of(group: h5py.Group) -> FitOutcome:
    """How its fit went."""
    return FitOutcome(**json.loads(group.attrs["fit"]))


def name_of(target_map: Sequence[int]) -> str:
    """The name of a map's group: its targets, or `control` for the empty one."""
    return "-".join(map(str, target_map)) or CONTROL


def read_path_score(group: h5py.Group) -> PathScore:
    """The losses of a peeled path, or of the head control."""
    values = json.loads(group["score"][()])
    return PathScore(
        target_map=tuple(values["target_map"]),
        fits=tuple(FitOutcome(**fit) for fit in values["fits"]),
        unexplained=tuple(values["unexplained"]),
        nll_select=tuple(group["nll_select"][...].tolist()),
        nll_eval=tuple(group["nll_eval"][...].tolist()),
    )


def _read_paths(file: h5py.File) -> Paths | None:
    """What a finished fit holds of paths, without weights; None where none was peeled."""
    if "paths" not in file:
        return None
    group = file["paths"]
    about = json.loads(group["about"][()])
    return Paths(
        control=read_path_score(group[CONTROL]),
        scores=tuple(read_path_score(one) for name, one in group.items() if name not in (CONTROL, "about")),
        schemes=tuple(about["schemes"]),
        left_out=tuple(about["left_out"]),
        num_fits=int(about["num_fits"]),
        seconds=float(about["seconds"]),
    )
