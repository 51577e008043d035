"""The first stage: make sure of the file of trained states."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from peelcli.calibration import Calibration, build_calibration
from peelcli.calibration.files import holds_text
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.tokenizer import load_tokenizer, special_ids
from peelcli.config import ExtractConfig, parse_layers
from peelcli.errors import CheckpointError
from peelcli.records import run_from
from peelcli.records.progress import Progress
from peelcli.runtime.batch_sizes import block_batch
from peelcli.runtime.locks import held
from peelcli.scoring.trained_pass import Extraction, extract, stored_states
from peelcli.stages.describe import describe
from peelcli.stages.inspection import Inspection
from peelcli.stages.keys import extraction_key, is_finished, relevant
from peelcli.stages.open_model import open_model
from peelcli.stages.precision import to_settings
from peelcli.stages.workspace import Workspace, require_outside
from peelcli.storage.activations import ActivationFile
from peelcli.tracking.same_tokens import Tokens, require_same_tokens, tokens_of


def calibrate(opened: Inspection, model: BlockwiseModel, settings: ExtractConfig) -> Calibration:
    """The token ids of the run, through the checkpoint's own tokenizer."""
    tokenizer = load_tokenizer(opened.path) if not settings.data or holds_text(settings.data) else None
    budget = {"fit": settings.fit_tokens, "select": settings.select_tokens, "eval": settings.eval_tokens}
    return build_calibration(
        settings.data,
        tokenizer,
        model.vocab_size,
        model.max_positions,
        settings.seq_len,
        budget,
        settings.seed,
        special_ids(opened.files),
    )


def run_extract(
    opened: Inspection,
    settings: ExtractConfig,
    workspace: Workspace,
    output: Path | None = None,
    first: Tokens | None = None,
) -> Generator[Progress, None, Path]:
    """Make sure of the file of trained states; returns its path.

    first: the tokens of the series that the checkpoint is to be compared with. UsageError where its own differ, before
    anything is run.
    """
    key = extraction_key(opened, settings)
    path = output or workspace.activations(key)
    require_outside(path, opened.path)

    def is_done() -> bool:
        return is_finished(path, key, settings, _key_of, named=output is not None)

    if not is_done():
        with (yield from held(path, wait=settings.wait)):
            if not is_done():  # else another process has done it meanwhile
                yield from _extract(opened, settings, workspace, path, first)
                return path
    if first is not None:
        require_same_tokens(first, tokens_of(run_from(_about(path))))
    return path


def _extract(
    opened: Inspection, settings: ExtractConfig, workspace: Workspace, path: Path, first: Tokens | None
) -> Generator[Progress, None, None]:
    if not opened.is_finite:
        finding = next(f for f in opened.scan.findings if f.is_non_finite)
        raise CheckpointError(
            f"{finding.message} Nothing can be extracted; `peel audit` reports the layer as broken."
        )
    yield Progress("open", 0, 2, "model")
    model = open_model(opened, settings, workspace)
    layers = parse_layers(settings.layers, model.num_layers)
    yield Progress("open", 1, 2, "calibration tokens")
    with opened.stamp.watched():
        calibration = calibrate(opened, model, settings)
        opened.stamp.require_unchanged()
    if first is not None:
        require_same_tokens(first, _tokens(opened, calibration, settings))
    about = describe(
        opened.path,
        model,
        calibration,
        scan=opened.scan,
        layers=layers,
        stored_bits=opened.stored_bits,
        seed=settings.seed,
        precision=opened.precision,
    )
    task = Extraction(
        output=path,
        about={**about, "key": extraction_key(opened, settings)},
        config={"extract": relevant(settings), "trained_scheme": to_settings(opened.trained)},
        stored=stored_states(model.num_layers, layers),
        store_dtype=about["dtype"] if settings.store_dtype == "auto" else settings.store_dtype,
        batch_size=settings.batch_size or block_batch(calibration.seq_len, model.device),
        resume=settings.resume and not settings.overwrite,
    )
    yield from extract(model, calibration, task)


def _about(path: Path) -> dict[str, Any]:
    acts = ActivationFile(path)
    acts.close()
    return acts.about


def _key_of(path: Path) -> str:
    return str(_about(path).get("key"))


def _tokens(opened: Inspection, calibration: Calibration, settings: ExtractConfig) -> Tokens:
    return Tokens(
        checkpoint=str(opened.path),
        data_hash=calibration.content_hash,
        data=calibration.description,
        tokens=calibration.tokens,
        seq_len=calibration.seq_len,
        seed=settings.seed,
        vocab_size=calibration.vocab_size,
    )
