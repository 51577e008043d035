"""Read a finished fit without its weights: the run with the losses of every reference and peeled path.

A report needs no more, and without torch it starts quickly. `fit_writer` describes the layout of the file, and
`replacement_weights` reads the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peelcli.records import FitOutcome, Paths, PathScore, Reference, Run, Score
from peelcli.records.check_run import UNBOUNDED, check_outcome, check_run
from peelcli.records.from_json import from_json
from peelcli.storage.hdf5 import open_h5
from peelcli.storage.hdf5_reader import Group, StoredFile

SCHEMA, SCHEMA_VERSION = "peel/fit", 2  # 1: without checksums
CONTROL = "control"
# What a finished fit says it holds, so that nothing can be left out of it unseen: reference keys, names of maps.
HOLDS_REFERENCES, HOLDS_PATHS = "holds_references", "holds_paths"
_TRAINED_ARRAYS = ("nll_select", "nll_eval", "entropy_eval")
_SCORE_ARRAYS = ("nll_select", "nll_eval", "kl_eval")


def key_of(path: Path) -> str | None:
    """The key of the work that a finished fit is the result of; None if the file has none."""
    with open_h5(path, SCHEMA, SCHEMA_VERSION) as file:
        key = file.root.json("config").get("key")
    return key if isinstance(key, str) else None


def read_fit(path: Path) -> Run:
    """The run in the finished fit `path`, with the losses of every reference. Raises ArtefactError if damaged."""
    with open_h5(path, SCHEMA, SCHEMA_VERSION) as file:
        about = file.root.json("about")
        references = file.root.group("references").groups()
        _require_all(file, about, HOLDS_REFERENCES, [name for name, _ in references])
        scores = tuple(_read_score(one) for _, one in references)
        trained = file.root.group("trained")
        measured = {name: _losses(trained, name) for name in _TRAINED_ARRAYS}
        paths = _read_paths(file, about)
        with file.reading("about"):
            plain = {name: value for name, value in about.items() if name not in ("scores", "paths")}
            run = from_json(Run, {**plain, **measured}, unbounded=(*UNBOUNDED, *measured))
            run = replace(run, scores=scores, paths=paths)
        with file.reading("the run"):
            check_run(run)
        return run


def reference_of(group: Group) -> Reference:
    """The reference whose results are in a group."""
    value = group.json("reference")
    with group.stored.reading(f"{group.name}/reference"):
        reference = from_json(Reference, value)
        if reference.key != group.name.rpartition("/")[2]:
            raise ValueError(f"it is that of {reference.key}")
        return reference


def outcome_of(group: Group) -> FitOutcome:
    """The outcome of the fit of a group's reference."""
    value = group.json("fit")
    with group.stored.reading(f"{group.name}/fit"):
        outcome = from_json(FitOutcome, value, unbounded=UNBOUNDED)
        check_outcome(outcome)
        return outcome


def name_of(target_map: Sequence[int]) -> str:
    """The HDF5 group name of a target map: its targets, or `control` for the empty map."""
    return "-".join(map(str, target_map)) or CONTROL


def read_path_score(group: Group, name: str | None = None) -> PathScore:
    """The losses of a peeled path or of the head control.

    name: the `name_of` the target map that the group must belong to; None accepts any.
    """
    losses = {name: _losses(group, name) for name in ("nll_select", "nll_eval")}
    value = group.json("score")
    with group.stored.reading(f"{group.name}/score"):
        score = from_json(PathScore, {**value, **losses}, unbounded=(*UNBOUNDED, *losses))
        if name is not None and name_of(score.target_map) != name:
            raise ValueError(f"it is that of the map {name_of(score.target_map)}")
        return score


def _losses(group: Group, name: str) -> tuple[float, ...]:
    return tuple(group.array(name, ("float64",), (None,)).tolist())


def _read_score(group: Group) -> Score:
    return Score(reference_of(group), outcome_of(group), *(_losses(group, name) for name in _SCORE_ARRAYS))


def _read_paths(file: StoredFile, about: dict[str, Any]) -> Paths | None:
    """The peeled paths of a finished fit, without weights; None if no path was peeled."""
    found = file.root.group("paths") if "paths" in file.root else None
    names = [name for name in found.names() if name != "about"] if found else []
    _require_all(file, about, HOLDS_PATHS, names)
    if found is None:
        return None
    value = found.json("about")
    scores = {name: read_path_score(found.group(name), name) for name in names}
    with file.reading("paths"):
        control = scores.pop(CONTROL)
        return Paths(control=control, scores=tuple(scores.values()), **_paths_about(value))


def _paths_about(value: dict[str, Any]) -> dict[str, Any]:
    """The fields that all peeled paths share, checked."""
    nothing = asdict(PathScore((), (), (), (), ()))
    checked = from_json(Paths, {**value, "control": nothing, "scores": []})
    return {name: getattr(checked, name) for name in ("schemes", "left_out", "num_fits", "seconds")}


def _require_all(file: StoredFile, about: dict[str, Any], what: str, names: Sequence[str]) -> None:
    """Raise ArtefactError if the file's groups are not exactly those that the writer listed in `about`."""
    with file.reading("about"):
        if file.is_checked and sorted(about[what]) != sorted(names):
            raise ValueError(
                f"the file should hold {len(about[what])} {what.removeprefix('holds_')}, others are there"
            )
