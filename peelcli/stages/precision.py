"""In which precision a checkpoint runs: what its files say, or what the user says of the training (`trained_scheme`).

What is decided here is handed to the model as plain functions. A checkpoint that says it is quantised, and cannot be
run so, is refused: never is one read as if its weights were plain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor

from peelcli.checkpoint.files import CheckpointFiles
from peelcli.checkpoint.packed import bitnet
from peelcli.checkpoint.packed.codes import Activations, step_figures
from peelcli.checkpoint.packed.detect import find_packing, quantization_settings
from peelcli.checkpoint.running import AS_STORED, Latent, Running
from peelcli.config import TrainedSchemeConfig, resolve
from peelcli.config.schemes import granularity_of
from peelcli.config.setting import settings_of
from peelcli.errors import CheckpointError, UsageError
from peelcli.quant.latent_weights import round_latent, round_tokens
from peelcli.quant.schemes import scheme_named
from peelcli.records import QuantizedModule
from peelcli.records.quant_spec import QuantSpec

Selects = Callable[[str, bool], bool]  # the module's full name, and whether it lies in a block
_PLAIN_PATTERN = re.compile(
    r"[\w.\-*]{1,200}"
)  # what is understood of the patterns in a config that was not ours
_MOST_STARS = 4  # more of them could be made to take for ever


@dataclass(frozen=True)
class Precision:
    """How a checkpoint runs, and how that is known. `method` is "" where its weights are plain."""

    method: str
    running: Running
    activations: Activations | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the weights run as they are stored."""
        return self.running is AS_STORED


PLAIN = Precision("", AS_STORED)


def precision_of(files: CheckpointFiles, trained: TrainedSchemeConfig | None = None) -> Precision:
    """How the checkpoint runs. Raises CheckpointError where it is quantised and cannot be run as that.

    trained: what the user says of a training of their own. UsageError where it contradicts itself or the checkpoint.
    """
    packing = find_packing(files)
    settings = quantization_settings(files.config)
    if trained is not None and trained.trained_scheme is not None:
        if settings is not None:
            raise UsageError(
                f"--trained-scheme {trained.trained_scheme}: {files.directory} says itself that it is quantised, by "
                f"{settings.get('quant_method')!r}. Leave the option out: it runs as it says"
            )
        rule = _rule(trained)
        bits = trained.trained_activation_bits
        if bits is not None and bits > 16:
            raise UsageError(f"--trained-activation-bits {bits}: expected 2 to 16")
        rounding = Activations(bits, float(2 ** (bits - 1) - 1)) if bits else None
        selects = partial(_matches, trained.trained_modules)
        return _latent("trained_scheme", rule, selects, rounding)
    _require_whole(trained)
    if packing is not None:
        rounding = packing.activations
        running = Running(packing=packing, activation=_round(rounding))
        return Precision(packing.method, running, rounding, packing.notes)
    if settings is not None:  # and is not packed: BitNet's latent weights
        selects = partial(_converts, _patterns(settings.get("modules_to_not_convert")))
        return _latent("bitnet", QuantSpec("ternary", None, "tensor", "absmean"), selects, bitnet.INT8)
    return PLAIN


def from_settings(values: Mapping[str, Any] | None, source: str) -> TrainedSchemeConfig | None:
    """The settings that the artefact `source` keeps (`to_settings`), checked as a file's; None where it keeps none."""
    if not values:
        return None
    return resolve((TrainedSchemeConfig,), {"trained_scheme": values}, {}, {}, source=source)[
        TrainedSchemeConfig
    ]


def to_settings(trained: TrainedSchemeConfig | None) -> dict[str, Any] | None:
    """The settings as JSON values under their keys in a YAML file; None where they say nothing."""
    if trained is None or trained.trained_scheme is None:
        return None
    values = {rule.key: getattr(trained, name) for name, rule in settings_of(TrainedSchemeConfig).items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _latent(method: str, spec: QuantSpec, selects: Selects, rounding: Activations | None) -> Precision:
    latent = Latent(selects, partial(_rounded, spec))
    return Precision(method, Running(latent=latent, activation=_round(rounding)), rounding)


def _round(activations: Activations | None) -> Callable[[Tensor], Tensor] | None:
    if activations is None:
        return None
    return partial(
        round_tokens,
        num_bits=activations.num_bits,
        peak=activations.peak,
        by_inverse=activations.by_inverse,
    )


def _rounded(
    spec: QuantSpec, module: str, layer: int | None, weight: Tensor
) -> tuple[Tensor, QuantizedModule]:
    """One latent weight (…, d_out, d_in) as it runs, and what a report says of it."""
    found = round_latent(weight, spec)
    median, outliers = step_figures(found.scale)
    return found.weight, QuantizedModule(
        name=module,
        layer=layer,
        scheme=spec.scheme,
        num_bits=scheme_named(spec.scheme).num_bits,
        granularity=spec.granularity,
        group_size=spec.group_size,
        zeros=float((found.weight == 0).float().mean()),
        scale=median,
        scale_outliers=outliers,
        clipped=found.clipped,
    )


def _rule(trained: TrainedSchemeConfig) -> QuantSpec:
    size = trained.trained_group_size
    granularity = granularity_of(trained.trained_granularity, size, "--trained-")
    return QuantSpec(str(trained.trained_scheme), size, granularity, trained.trained_scale)


def _require_whole(trained: TrainedSchemeConfig | None) -> None:
    """Details of a scheme that is not named would be passed over in silence."""
    if trained is None:
        return
    default = TrainedSchemeConfig()
    given = [f.name for f in fields(default) if getattr(trained, f.name) != getattr(default, f.name)]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(
            f"{flags}: say how weights were trained, and no --trained-scheme says that they were; add it"
        )


def _matches(globs: tuple[str, ...], module: str, in_block: bool) -> bool:
    if not globs:
        return in_block
    return any(fnmatchcase(module, glob) for glob in globs)


def _patterns(found: object) -> tuple[str, ...] | None:
    """What BitNet's config leaves unquantised; None: what transformers leaves by default, the head."""
    if found is None:
        return None
    names = found if isinstance(found, list) else [found]
    for name in names:
        if not isinstance(name, str) or not _PLAIN_PATTERN.fullmatch(name) or name.count("*") > _MOST_STARS:
            raise CheckpointError(
                f"config.json: modules_to_not_convert holds {name!r}, expected names of modules; correct it"
            )
    return tuple(names)


def _converts(left_out: tuple[str, ...] | None, module: str, in_block: bool) -> bool:
    """transformers' rule: a pattern leaves out what it matches up to the end of a part of the name, or ends."""
    if left_out is None:
        return in_block
    return not any(
        module.endswith(name) or re.match(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", module) for name in left_out
    )
