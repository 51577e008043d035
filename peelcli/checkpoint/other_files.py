"""Report files in a checkpoint's directory that a user could mistake for the audited weights.

Nothing here decides what is loaded: peel loads what transformers loads from the directory. Each finding names the
loaded files, the files left out, and what to do if those were meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from peelcli.checkpoint.adapter import find_adapter, how_to_merge
from peelcli.checkpoint.files import CheckpointFiles, head_of
from peelcli.checkpoint.json_files import read_object_if_whole
from peelcli.errors import CheckpointError
from peelcli.records import Finding

OTHER_WEIGHTS, STALE_SHARDS, ADAPTER, OWN_CODE = "other-weights", "stale-shards", "adapter", "own-code"
KINDS = frozenset({OTHER_WEIGHTS, STALE_SHARDS, ADAPTER, OWN_CODE})

_TENSOR_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# What transformers loads from a directory by default, in its order of preference.
_LOADABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a single safetensors file", ("model.safetensors",)),
    ("safetensors shards", ("model.safetensors.index.json", "model-*-of-*.safetensors")),
    ("a single pickle file", ("pytorch_model.bin",)),
    ("pickle shards", ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")),
)
# What transformers loads only on request, or never.
_OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "averaged (EMA) weights",
        tuple(
            f"{name}{suffix}" for name in ("ema", "ema[._-]*", "*[._-]ema*") for suffix in _TENSOR_SUFFIXES
        ),
    ),
    (
        "another variant of the weights",
        (
            "model.*.safetensors",
            "model.safetensors.index.*.json",
            "pytorch_model.*.bin",
            "*.bin.index.*.json",
        ),
    ),
    ("weights in their makers' own layout", ("consolidated*.pth", "consolidated*.safetensors")),
    ("a GGUF file", ("*.gguf",)),
    ("TensorFlow or Flax weights", ("tf_model*.h5", "flax_model*.msgpack")),
    ("a checkpoint of Lightning or nanoGPT", ("*.ckpt", "ckpt.pt", "lit_model.pth")),
    ("a distributed checkpoint", ("*.distcp",)),
    ("other safetensors", ("*.safetensors",)),
)
# Adapters and a trainer's own state are not weights of the model, even if their names match a pattern above.
_NO_WEIGHTS = ("adapter_model*", "optimizer*", "scheduler*")
_EQUAL_S = 2.0  # modification times within these seconds count as equal, because archives and file systems round them


def other_files(files: CheckpointFiles) -> list[Finding]:
    """Findings about files next to the weights of `files` that were not audited or not run.

    Reads file names and times only. Raises CheckpointError if the directory changes meanwhile.
    """
    try:
        return [*_other_weights(files), *_adapter(files), *_own_code(files)]
    except OSError as error:
        raise CheckpointError(
            f"{files.directory}: changed or removed while it was audited ({error.strerror}: {error.filename}); "
            "audit it again once nothing writes to it"
        ) from error


# -- other weights -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Set:
    """The files that together hold one model. written: when the newest was written, seconds since the epoch."""

    what: str
    names: tuple[str, ...]
    written: float

    @property
    def is_loadable(self) -> bool:
        """Whether transformers would load this set if the sets that it prefers were removed."""
        return any(self.what == what for what, _ in _LOADABLE)

    @property
    def is_bare_index(self) -> bool:
        """Whether it is an index without any of its shards."""
        return len(self.names) == 1 and self.names[0].endswith(".json")

    def __str__(self) -> str:
        without = ", whose shards are not here" if self.is_bare_index else ""
        return f"{self.what} ({_listed(self.names)}{without})"


def _other_weights(files: CheckpointFiles) -> Iterator[Finding]:
    head = head_of(files)
    written = max(file.stat().st_mtime for file in (head, *files.files))
    found = []
    for other in _sets(files, head):
        if head.suffix == ".json" and other.what == _what(head.name):
            yield _stale(head, other, _when(other, written))
        else:
            found.append(other)
    if not found:
        return
    count = "two" if len(found) == 1 else str(len(found) + 1)
    explicit = "transformers_weights" in files.config
    why = "which config.json names" if explicit else "which transformers loads before any other"
    left_out = "; ".join(f"{other}, {_when(other, written)}" for other in found)
    newer = [other for other in found if other.written > written + _EQUAL_S]
    yield Finding(
        OTHER_WEIGHTS,
        f"{count} sets of weights lie here; audited: {head.name}, {why}. Left out: {left_out}. "
        f"{_what_to_do(head, found, newer, explicit)}",
    )


def _sets(files: CheckpointFiles, head: Path) -> list[_Set]:
    """The sets of weights in the directory apart from the audited files, in transformers' order of preference."""
    used = {head.name, *(file.name for file in files.files)}
    names: dict[str, list[str]] = {}
    written: dict[str, float] = {}
    for path in sorted(files.directory.glob("*")):
        what = None if path.name in used else _what(path.name)
        if what is not None and path.is_file():
            names.setdefault(what, []).append(path.name)
            written[what] = max(written.get(what, 0.0), path.stat().st_mtime)
    sets = [
        _Set(what, tuple(names[what]), written[what]) for what, _ in (*_LOADABLE, *_OTHERS) if what in names
    ]
    return [s for s in sets if not (s.is_bare_index and _shards(files.directory / s.names[0]) <= used)]


def _what(name: str) -> str | None:
    """The kind of weights that a file of this name holds; None for any other file."""
    if any(fnmatch(name, pattern) for pattern in _NO_WEIGHTS):
        return None
    kinds = (*_LOADABLE, *_OTHERS)
    return next((what for what, patterns in kinds if any(fnmatch(name, p) for p in patterns)), None)


def _shards(index: Path) -> set[str]:
    """The files that an index names. For an unreadable index, its own name, so that it matches no file in use."""
    shards = read_object_if_whole(index).get("weight_map")
    return {str(name) for name in shards.values()} if isinstance(shards, dict) else {index.name}


def _stale(head: Path, others: _Set, when: str) -> Finding:
    number = "1 shard lies" if len(others.names) == 1 else f"{len(others.names)} shards lie"
    message = (
        f"{number} here that {head.name} does not name ({_listed(others.names)}), {when}: left out, as transformers "
        "does; probably left over from another save. If what the index names is the older save, copy or save the "
        "checkpoint again; else delete the rest"
    )
    return Finding(STALE_SHARDS, message)


def _what_to_do(head: Path, found: Sequence[_Set], newer: Sequence[_Set], explicit: bool) -> str:
    wanted = next((other for other in newer if other.is_loadable and not other.is_bare_index), None)
    if wanted is not None:
        meant = f"If the newer {wanted.names[0]} is what you meant"
        if explicit:
            return (
                f"{meant}, take transformers_weights out of config.json, keep that set alone, and audit again"
            )
        ahead = [name for o in found[: found.index(wanted)] if o.is_loadable for name in o.names]
        return f"{meant}, move {_listed([head.name, *ahead])} to another directory and audit again"
    if newer:
        return (
            f"If the newer {newer[0].names[0]} is what you meant, save that model with save_pretrained first"
        )
    return "If another is what you meant, audit a directory that holds config.json and that set alone"


def _when(other: _Set, audited: float) -> str:
    """How much newer or older a set is than the audited files, by modification time."""
    seconds = abs(other.written - audited)
    if seconds <= _EQUAL_S:
        return "written at the same time"
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, unit = next((seconds / length, unit) for length, unit in units if seconds >= 2 * length)
    return f"written {size:.0f} {unit} {'later' if other.written > audited else 'earlier'}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- an adapter, own code ------------------------------------------------------------------------------------------


def _adapter(files: CheckpointFiles) -> Iterator[Finding]:
    adapter = find_adapter(files.directory)
    if adapter is not None:
        message = (
            f"an adapter lies beside the model and was left out ({adapter}): what was audited is the model without "
            f"it. To audit both as one, {how_to_merge(adapter, files.directory)}"
        )
        yield Finding(ADAPTER, message)


def _own_code(files: CheckpointFiles) -> Iterator[Finding]:
    """A finding if the checkpoint brings its own model code, although peel ran the class of transformers."""
    classes = files.config.get("auto_map")
    named = (
        sorted(
            f"{key}: {value}" for key, value in classes.items() if key.startswith(("AutoModel", "AutoConfig"))
        )
        if isinstance(classes, dict)
        else []
    )
    modules = sorted(path.name for path in files.directory.glob("modeling_*.py"))
    if not named and not modules:
        return
    brought = [f"config.json names {'; '.join(named[:3])}"] if named else []
    brought += [f"{', '.join(modules[:3])} lies here"] if modules else []
    message = (
        f"the checkpoint brings its own model code ({', and '.join(brought)}), which was not run: peel ran the class "
        f"that transformers has for model type {files.config.get('model_type')!r}. If the two differ, the figures are "
        "those of another network: compare the loss in this report with the one that you know of it"
    )
    yield Finding(OWN_CODE, message)
