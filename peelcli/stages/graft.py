"""Repair: a reference in place of what it stands in for, as a checkpoint that transformers opens.

What is dropped is written as zeros: a sublayer whose matrices and biases are zero adds nothing to the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from peelcli.checkpoint.files import CheckpointFiles, open_checkpoint
from peelcli.checkpoint.graft import Replace, require_same_parts, take_apart, write_copy
from peelcli.checkpoint.layers import group_by_layer
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.plain import plain_config
from peelcli.errors import CheckpointError
from peelcli.records import Dropped, Other, Reference, Stored
from peelcli.stages.workspace import require_outside
from peelcli.storage.parts import load_weights


def graft(
    fit: Path, files: CheckpointFiles, model: BlockwiseModel, reference: Reference, output: Path
) -> None:
    """Write a copy of the checkpoint to `output` with `reference`, as fitted in `fit`, in place.

    Of a checkpoint that runs in few bits the copy holds the weights that run, as plain numbers, and says nothing of
    quantisation any more: packed again, or rounded again from latents, the reference would not be what was measured.
    """
    require_outside(output, files.directory)
    source = files.directory
    if model.plain_directory != source:
        files = open_checkpoint(model.plain_directory)
    layers, _ = group_by_layer(files, model.num_layers)
    names = {
        layer: {relative: info.name for relative, info in members.items()}
        for layer, members in layers.items()
    }
    wanted: dict[int, dict[str, Replace]] = {}

    def put(layer: int, relative: str, replace: Replace) -> None:
        wanted.setdefault(layer, {})[relative] = replace

    for layer in range(1, model.num_layers + 1):
        rounded = [m.name for m in model.matrices(layer) if model.weights.is_rounded(layer, m.name)]
        for relative in rounded:
            put(layer, relative, _as_it_runs(model, layer, relative))
    for layer in range(reference.layer, reference.target + 1):
        put_here = reference.weights_at(layer)
        if isinstance(put_here, Dropped):
            for relative in _contributing(model, layer, put_here.sublayers):
                put(layer, relative, torch.zeros_like)
        elif isinstance(put_here, Other):
            for relative, value in model.read_weights(put_here.layer).items():
                put(layer, relative, _as_it_is(value.cpu()))
        elif isinstance(put_here, Stored):
            replacement = load_weights(fit, reference)
            like = torch.empty(0, dtype=torch.float32)
            trained = model.read_weights(layer) if replacement.scaled else None
            for relative, value in replacement.weights(like, trained).items():
                put(layer, relative, _constant(value))
    config = plain_config(files.config, model.dtype) if model.runs_in_few_bits else None
    replacements: dict[str, Replace] = {}
    for layer, of_layer in wanted.items():
        replacements |= _as_in_files(files, model, layer, of_layer, names.get(layer, {}))
    write_copy(files, replacements, output, source, config, model.stamp)


def _as_in_files(
    files: CheckpointFiles,
    model: BlockwiseModel,
    layer: int,
    wanted: dict[str, Replace],
    names: dict[str, str],
) -> dict[str, Replace]:
    """What becomes of the tensors in the files, where `wanted` says it of a block's parameters.

    names: of the layer's tensors, by their names within it. Where transformers makes one parameter out of several
    tensors, as it does of a mixture's experts, the new block is taken apart again as save_pretrained would.
    """
    if all(relative in names for relative in wanted):
        return {names[relative]: replace for relative, replace in wanted.items()}
    trained = model.read_weights(layer)
    new = {relative: wanted[relative](t) if relative in wanted else t for relative, t in trained.items()}
    before, after = (take_apart(model.model, f"{model.blocks_name}.{layer - 1}.", w) for w in (trained, new))
    require_same_parts(files, layer, before, names, model.dtype)
    changed = [relative for relative, value in after.items() if not torch.equal(value, before[relative])]
    return {names[relative]: _constant(after[relative].cpu()) for relative in changed}


def _as_it_runs(model: BlockwiseModel, layer: int, relative: str) -> Replace:
    return lambda _: model.read_weights(layer)[relative].cpu()


def _as_it_is(value: Tensor) -> Replace:
    return lambda _: value


def _constant(value: Tensor) -> Replace:
    return lambda old: value.to(old.dtype)


def _contributing(model: BlockwiseModel, layer: int, parts: Iterable[str]) -> list[str]:
    """The matrices and biases of some sublayers; their norms stay, for a norm of zeros is zero."""
    sublayers = {s.name: s for s in model.sublayers(layer)}
    if not sublayers:
        raise CheckpointError(
            f"layer {layer}: attention and MLP cannot be told apart in {model.family}, so dropping the block cannot be "
            "written as weights. Graft another reference, or remove the layer from the model."
        )
    prefixes = tuple(f"{module}." for part in parts for module in sublayers[part].modules)
    matrices = {m.name for m in model.matrices(layer)}
    biases = {m.rpartition(".")[0] + ".bias" for m in matrices}
    return [n for n in model.parameter_names(layer) if n.startswith(prefixes) and n in matrices | biases]
