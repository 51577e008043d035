"""Find and check the files of a Hugging Face checkpoint directory before any model is built.

Everything here is untrusted input. A name in an index may not point outside the directory, pickles are read by torch's
weights-only unpickler, and an incomplete file is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from peelcli.checkpoint import pickle_format, safetensors_format
from peelcli.checkpoint.foreign import how_to_open
from peelcli.checkpoint.hub import snapshot_of
from peelcli.checkpoint.json_files import ANEW as _ANEW
from peelcli.checkpoint.json_files import read_object
from peelcli.errors import CheckpointError
from peelcli.records import Finding

FORMATS = {"safetensors": safetensors_format, "pickle": pickle_format}

# In order of preference; transformers has the same order.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_GOOD = "config.json beside model.safetensors or pytorch_model.bin (or their shards and index)"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk. dtype: torch's name without "torch.". nbytes: size of the contiguous tensor."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointFiles:
    """A complete checkpoint directory: its config, and the file that holds each tensor."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    format: str  # "safetensors" or "pickle"
    files: tuple[Path, ...]
    overlaid: tuple[str, ...] = ()  # tensors found in several shards; the index names the shard to use
    findings: tuple[Finding, ...] = ()


def open_checkpoint(path: Path) -> CheckpointFiles:
    """Find config and weights in the directory `path` and check that they are complete.

    Reads no tensor's contents. If both safetensors and pickles are present, safetensors are used. Raises
    CheckpointError that says what is missing or damaged; for another tool's format it says how to convert it.
    """
    named, path = Path(path), snapshot_of(Path(path))
    if path.is_file():
        raise CheckpointError(f"{path}: is a file, expected a directory with {_GOOD}{how_to_open(path)}")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; name a directory with {_GOOD}")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: has no config.json, expected {_GOOD}{how_to_open(path)}")
    config = read_object(path / "config.json")
    head = _find_weights(path, config)
    weight_map = _read_index(head) if head.suffix == ".json" else None
    files = tuple(path / name for name in sorted(set(weight_map.values()))) if weight_map else (head,)
    _require_present(path, files)
    tensors, overlaid = _list_tensors(files, head, weight_map or {})
    if not tensors:
        raise CheckpointError(f"{head}: holds no tensors, expected a model's weights; {_ANEW}")
    _require_filled(path, tensors)
    findings = [] if path == named else [_snapshot_finding(named, path)]
    findings += [_overlay_finding(head, overlaid)] if overlaid else []
    return CheckpointFiles(path, config, tensors, _format(files[0]), files, overlaid, tuple(findings))


def head_of(files: CheckpointFiles) -> Path:
    """The file that holds the weights, or the index of their shards."""
    return _find_weights(files.directory, files.config)


def read_tensor(info: TensorInfo, rows: slice | None = None) -> torch.Tensor:
    """The contents of one tensor, or of a slice of its first dimension, on the CPU, in its own dtype."""
    with FORMATS[_format(info.file)].opened(info.file) as read:
        tensor: torch.Tensor = read(info.name, rows)
    return tensor


def _format(file: Path) -> str:
    return "safetensors" if file.suffix == ".safetensors" else "pickle"


def _find_weights(directory: Path, config: dict[str, Any]) -> Path:
    """The file that holds the weights, or the index of their shards."""
    explicit = config.get("transformers_weights")  # transformers loads this file before any other
    if explicit is not None:
        names: tuple[str, ...] = (_plain_name(explicit, directory / "config.json"),)
    else:
        names = _WEIGHTS
    for name in names:
        if (directory / name).is_file():
            return directory / name
    # An unfinished download leaves a dangling link in the cache. Report that as a missing file, not as "no weights".
    _require_present(directory, tuple(directory / name for name in names if (directory / name).is_symlink()))
    raise CheckpointError(
        f"{directory}: no weights found, expected {' or '.join(names)}{how_to_open(directory)}"
    )


def _plain_name(name: object, source: Path) -> str:
    """`name`, if it is a plain file name; else CheckpointError.

    The file in the directory may be a symlink, as in the Hugging Face cache, because the directory's owner made it.
    A path in the index is refused, because it would let the author of the index choose any file on the machine.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or "\0" in name
        or PureWindowsPath(name).name != name  # splits at both kinds of slashes
    ):
        raise CheckpointError(
            f"{source}: names the file {name!r}; expected a plain file name, because nothing outside the "
            f"checkpoint directory is read. Move the file beside {source.name} and correct the entry"
        )
    return name


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name → shard file name."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: has no weight_map, expected an object of tensor name → shard; {_ANEW}"
        )
    shards = {name: _plain_name(shard, index) for name, shard in weight_map.items()}
    kind = "safetensors" if "safetensors" in index.name else "pickle"
    for shard in set(shards.values()):
        if _format(Path(shard)) != kind:
            raise CheckpointError(f"{index}: lists {shard!r}, expected shards in the {kind} format; {_ANEW}")
    return shards


def _require_present(directory: Path, files: tuple[Path, ...]) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        names = ", ".join(f.name + (" (a dangling link)" if f.is_symlink() else "") for f in missing[:3])
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(files)} weight files are missing: {names}. "
            f"An unfinished copy, download or save? Wait for it, or {_ANEW}"
        )


def _list_tensors(
    files: tuple[Path, ...], index: Path, weight_map: dict[str, str]
) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Every tensor in the file that the index names for it, and the names of tensors found in other files as well.

    Raises CheckpointError if the named file lacks a tensor, or if two files hold a tensor and the index names neither.
    """
    places: dict[str, list[TensorInfo]] = {}
    for file in files:
        _require_content(file)
        for name, (dtype, shape, nbytes) in FORMATS[_format(file)].list_tensors(file).items():
            places.setdefault(name, []).append(TensorInfo(name, file, dtype, shape, nbytes))
    for name, shard in weight_map.items():
        found = [info.file.name for info in places.get(name, [])]
        if shard not in found:
            what = f"{found[0]} does" if found else "it does not"
            raise CheckpointError(f"{index}: says that {shard} holds {name!r}, but {what}; {_ANEW}")
    tensors = {}
    for name, infos in places.items():
        if len(infos) > 1 and name not in weight_map:
            raise CheckpointError(
                f"{infos[1].file}: tensor {name!r} is also in {infos[0].file.name}, and {index.name} does not say "
                f"which of them counts; {_ANEW}"
            )
        tensors[name] = next(i for i in infos if i.file.name == weight_map.get(name, i.file.name))
    return tensors, tuple(name for name, infos in places.items() if len(infos) > 1)


def _snapshot_finding(entry: Path, snapshot: Path) -> Finding:
    message = f"{entry} is an entry of the Hugging Face cache; its snapshot {snapshot.name} was audited"
    return Finding("hub-snapshot", message)


def _overlay_finding(index: Path, names: tuple[str, ...]) -> Finding:
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    message = f"{names[0]!r}{more} lie in several shards; what {index.name} names was audited"
    return Finding("overlaid-tensors", message)


def _require_filled(directory: Path, tensors: dict[str, TensorInfo]) -> None:
    """Raise CheckpointError if most tensors are empty."""
    empty = [name for name, info in tensors.items() if not info.numel]
    if 2 * len(empty) > len(tensors):
        raise CheckpointError(
            f"{directory}: {len(empty):,} of {len(tensors):,} tensors are empty, such as {empty[0]!r} of shape "
            f"{list(tensors[empty[0]].shape)}, as DeepSpeed's ZeRO-3 leaves what save_pretrained writes without "
            "gathering. Merge the shards with DeepSpeed's zero_to_fp32.py, then save_pretrained"
        )


def _require_content(file: Path) -> None:
    """Raise CheckpointError if a weight file is empty, unreadable, or a Git LFS pointer."""
    try:
        with file.open("rb") as stream:
            start = stream.read(40)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); check its permissions") from error
    if not start:
        raise CheckpointError(f"{file}: is empty, expected weights; {_ANEW}")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{file}: is a Git LFS pointer, not the weights; run `git lfs pull` in its directory"
        )


def require_decoder_only(config: dict[str, Any]) -> None:
    """Raise CheckpointError unless transformers has a causal language model for this config.

    config: the parsed config.json. Remote code (`auto_map`) is not an error, but it is never run. A `model_type` that
    transformers does not know is an error. Imports transformers.
    """
    from transformers import __version__ as version
    from transformers.models.auto import modeling_auto as auto

    model_type = config.get("model_type")
    causal, seq2seq = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, _encoder_decoder_types(auto)
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"config.json: model_type is {model_type!r}, expected a name such as 'llama'; {_ANEW}"
        )
    if config.get("is_encoder_decoder"):
        raise _unsuited(config, "is an encoder-decoder model")
    if model_type not in causal:
        nested = config.get("text_config")
        inner = nested.get("model_type") if isinstance(nested, dict) else None
        if isinstance(inner, str) and inner in causal:
            raise _unsuited(config, f"is a multimodal model; save its language model ({inner!r}) alone")
        if model_type in seq2seq:
            raise _unsuited(config, "is an encoder-decoder model")
        if model_type in auto.CONFIG_MAPPING_NAMES:  # type: ignore[attr-defined]
            raise _unsuited(config, f"has no causal language model in transformers {version}")
        remote = "; the checkpoint brings its own code, which is not run" if config.get("auto_map") else ""
        raise _unsuited(
            config, f"is not known to transformers {version}{remote}; a newer transformers may know it"
        )
    architectures = config.get("architectures")
    names = [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    if model_type in seq2seq:
        if not any(a == causal[model_type] for a in names):
            raise _unsuited(config, "is an encoder-decoder model")
    elif model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or model_type == "bert-generation":
        if not (config.get("is_decoder") or config.get("causal")):  # "causal" is XLM's name for it
            raise _unsuited(config, "is an encoder (its config does not set is_decoder)")
    elif names and not any(_has_causal_head(a, causal[model_type]) for a in names):
        raise _unsuited(config, "has another head than a language model's")


def _encoder_decoder_types(auto: Any) -> set[str]:
    """The model types whose complete model is an encoder-decoder."""
    text = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    speech = auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    return {*text, *speech}


def _has_causal_head(architecture: str, expected: str) -> bool:
    # A bare XModel is accepted: its head may be tied to the embedding. If it is not, loading reports it as missing.
    bare = architecture.endswith("Model") and "For" not in architecture
    return (
        architecture == expected or bare or architecture.endswith(("ForCausalLM", "ForConditionalGeneration"))
    )


def _unsuited(config: dict[str, Any], what: str) -> CheckpointError:
    architectures = config.get("architectures")
    return CheckpointError(
        f"config.json: model_type {config.get('model_type')!r} (architectures {architectures!r}) {what}; "
        "expected a decoder-only language model that transformers itself implements, such as "
        "LlamaForCausalLM. Audit such a checkpoint instead"
    )
