"""A series: the checkpoints that a command's arguments name, in the order in which they were saved."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.hub import snapshot_of
from peelcli.checkpoint.training_step import training_step
from peelcli.errors import CheckpointError


@dataclass(frozen=True)
class Member:
    """One checkpoint of a series. step: its optimiser step, if known; a single checkpoint's step is not read."""

    path: Path
    step: int | None = None

    def __str__(self) -> str:
        name = _name(self.path)
        return name if self.step is None else f"{name} (step {self.step})"


@dataclass(frozen=True)
class Series:
    """Checkpoints, oldest first and each directory once, with notes and warnings about how they were found."""

    members: tuple[Member, ...]
    is_run: bool  # a directory was named that holds checkpoints: there may be more of them next time
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def series_of(arguments: Sequence[Path]) -> Series:
    """The checkpoints among `arguments`, and those inside directories that are not checkpoints themselves.

    Ordered by step where all tell one, else as given, directories by name. CheckpointError for an argument that
    is neither. What a directory holds and is not whole is left out with a warning, for a trainer may be writing it;
    what was named itself is not looked into.
    """
    notes: list[str] = []
    for path in arguments:
        if (snapshot := snapshot_of(path)) != path:
            notes.append(
                f"{path}: is an entry of the Hugging Face cache; its snapshot {snapshot.name} is audited"
            )
    arguments = [snapshot_of(path) for path in arguments]
    named = {path.resolve() for path in arguments if _has_config(path)}
    found: list[Path] = []
    warnings: list[str] = []
    for argument in arguments:
        found += [argument] if _has_config(argument) else _listed(argument, named, warnings)
    paths: dict[Path, Path] = {}
    for path in found:
        kept = paths.setdefault(path.resolve(), path)
        if kept is not path:
            same = "named twice" if kept == path else f"the same directory as {kept}"
            notes.append(f"{path}: {same}; it is audited once")
    notes += [note for path in arguments if _has_config(path) and (note := _passed_over(path, paths))]
    members = [Member(path, _step(path, warnings) if len(paths) > 1 else None) for path in paths.values()]
    unknown = [_name(member.path) for member in members if member.step is None]
    if not unknown:
        members.sort(key=lambda member: member.step or 0)
    elif len(members) > 1:
        notes.append(
            "the checkpoints are taken in the order given, those of a directory by name, because no training step is "
            f"known of {', '.join(unknown)} (expected trainer_state.json, or a name such as checkpoint-400)"
        )
    is_run = any(not _has_config(argument) for argument in arguments)
    return Series(tuple(members), is_run, tuple(notes), tuple(warnings))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A sort key that compares numbers in names by value: step-9 before step-10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if at % 2 else part.casefold() for at, part in enumerate(parts)], name


def _listed(directory: Path, named: set[Path], warnings: list[str]) -> list[Path]:
    """The checkpoints directly below `directory`, by name. Those in `named` are not opened again."""
    if not directory.is_dir():
        open_checkpoint(directory)  # says what it is instead
    children = [child for child in directory.iterdir() if child.name[0] != "." and os.path.isdir(child)]
    found: list[Path] = []
    reasons: list[str] = []
    for child in sorted(children, key=lambda child: natural_key(child.name)):
        try:
            if not _has_config(child) and training_step(child) is None:
                continue  # logs and the like
            if child.resolve() not in named:
                open_checkpoint(child)
                training_step(child)
            found.append(child)
        except (CheckpointError, OSError) as error:
            reasons.append(str(error))
    if found:
        warnings += [f"left out, a checkpoint of {directory} that is not whole: {why}" for why in reasons]
        return found
    if any(map(_has_config, children)):
        raise CheckpointError(
            f"{directory}: none of the {len(reasons)} checkpoints in it is whole; the first: {reasons[0]}"
        )
    try:
        open_checkpoint(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Nor has any directory right below it a config.json") from error
    return [directory]  # it has become one since


def _passed_over(argument: Path, taken: Collection[Path]) -> str | None:
    """A note if a named checkpoint contains earlier ones of its run, as a Trainer's output directory does."""
    below = [child for child in argument.iterdir() if _has_config(child) and child.resolve() not in taken]
    names = sorted((child.name for child in below if _step(child, []) is not None), key=natural_key)
    if not names:
        return None
    return f"{argument}: is a checkpoint itself; those in it are not audited unless named too: {', '.join(names)}"


def _step(path: Path, warnings: list[str]) -> int | None:
    try:
        return training_step(path)
    except CheckpointError as error:  # it ends the audit of this checkpoint, and not that of the others
        warnings.append(str(error))
        return None


def _has_config(path: Path) -> bool:
    return os.path.isfile(path / "config.json")  # False where it may not be read, too


def _name(path: Path) -> str:
    return os.path.basename(os.path.abspath(path))
