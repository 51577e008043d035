"""Every setting of peel, by section.

The sections are the single source of the YAML keys, the flags, the `PEEL_*` variables and the help. A section
is named in YAML as its class without `Config`, in lower case; a key is the name of the field, with hyphens or
underscores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peelcli.config.schemes import TrainedSchemeConfig
from peelcli.config.setting import setting
from peelcli.errors import UsageError
from peelcli.records import KINDS
from peelcli.records.schemes import GRANULARITIES, SCALE_RULES, SCHEMES

DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMATS = ("table", "json", "csv", "markdown", "github", "junit", "sarif", "html")
FLAGGABLE = (
    "broken",
    "surpassed",
    "matched",
    "undecided",
    "untrained",
    "damaged",
    "unconverged",
    "red",
    "yellow",
    "regressed",
    "none",
)

LAYER_RANGE = r"([0-9]{1,9})(?:-([0-9]{1,9}))?"
LAYERS = rf"{LAYER_RANGE}(\s*,\s*{LAYER_RANGE})*"
PATHS = r"direct|last|first-last|all|search|none|\[ *[0-9]{1,9}( *, *[0-9]{1,9})* *\]"
DURATION = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(s|m|h)?"
LOG_TO = r"(tensorboard|wandb|mlflow):.+"
MARGIN = (
    "Nats per token that a matching reference may cost; auto follows what references cost elsewhere, and in a report "
    "takes the fit's."
)
DEVICE = r"auto|cpu|(cuda|mps|xpu)(:[0-9]{1,3})?"


@dataclass(frozen=True)
class DeviceConfig:
    """Settings of every command that runs the model."""

    device: str = setting(
        "auto",
        "Device to run on: auto takes the first accelerator, or else the CPU.",
        pattern=DEVICE,
        expects="a device such as auto, cpu or cuda:0",
        metavar="auto|cpu|cuda:N",
        shared=True,
    )
    dtype: str = setting(
        "auto", "Precision that the model runs in; auto follows the device.", choices=DTYPES, shared=True
    )
    kernels: str = setting(
        "auto",
        "Versions of the hot functions: auto takes kernels on a GPU, eager never does.",
        choices=("auto", "eager"),
        shared=True,
    )
    threads: int | None = setting(
        None,
        "CPU threads; auto respects the CPU quota of the container.",
        unset="auto",
        at_least=1,
        shared=True,
    )
    wait: bool = setting(
        True,
        "Wait where another process works on the same files; --no-wait ends with exit code 3 instead.",
        shared=True,
    )


@dataclass(frozen=True)
class MachineConfig(DeviceConfig):
    """Settings that `extract` and `fit` share: layers, seed, and what to do with existing results."""

    layers: str | None = setting(
        None,
        "Which layers, counted from 1, such as 1,4-6.",
        unset="all",
        pattern=LAYERS,
        expects="a list of layers such as 1,4-6",
        joined=True,
        metavar="LIST",
        shared=True,
    )
    batch_size: int | None = setting(
        None, "Sequences per forward pass; auto follows the memory.", unset="auto", at_least=1, shared=True
    )
    seed: int = setting(
        0, "Seed of everything that is drawn at random.", at_least=0, below=2**63, shared=True
    )
    resume: bool = setting(True, "Skip what an earlier run with the same settings has done.", shared=True)
    overwrite: bool = setting(False, "Do everything again, over what is there.", shared=True)


@dataclass(frozen=True)
class ExtractConfig(MachineConfig):
    """Settings for extracting the trained states.

    `tokens` is shared out to the three budgets by `resolve`; nothing else reads it.
    """

    data: tuple[Path, ...] = setting(
        (),
        "Calibration text (.txt, .jsonl) or token ids (.npy, .bin), repeatable.",
        unset="the language reference that comes with Python",
        metavar="FILE",
    )
    fit_tokens: int = setting(16384, "Tokens on which the references are fitted.", at_least=1)
    select_tokens: int = setting(8192, "Tokens on which the best reference is chosen.", at_least=1)
    eval_tokens: int = setting(16384, "Tokens on which every reported figure is measured.", at_least=1)
    tokens: int | None = setting(
        None,
        "Tokens in all, split 2:1:2 among the three above where they are not given.",
        at_least=5,
        unset="sum",
        split=(("fit_tokens", 2), ("select_tokens", 1), ("eval_tokens", 2)),
    )
    seq_len: int | None = setting(
        None, "Tokens per sequence; auto takes what the model allows, 256 at most.", unset="auto", at_least=2
    )
    store_dtype: str = setting(
        "auto", "Precision in which states are stored; auto takes that of the model.", choices=DTYPES
    )
    output: Path | None = setting(
        None, "HDF5 file to write the states to.", short="-o", metavar="FILE", unset="auto"
    )


@dataclass(frozen=True)
class FitConfig(MachineConfig):
    """Which references are fitted to replace a layer, in which low-bit scheme, and with how many steps."""

    scheme: str | None = setting(
        None,
        "Low-bit scheme in which the references' weights lie.",
        choices=SCHEMES,
        unset="ternary, or binary where a layer has one bit itself",
    )
    granularity: str | None = setting(
        None,
        "Weights that share one step: those of a matrix, of a row, or of a group in a row.",
        choices=GRANULARITIES,
        unset="group with a group size, else the checkpoint's where a reference has no fewer bits, or channel",
    )
    group_size: int | None = setting(
        None,
        "Weights of a row that share one step; channel means the whole row.",
        unset="channel",
        at_least=1,
    )
    scale: str = setting(
        "mse",
        "Rule for the steps that a fit starts from, and then moves: the mean or the largest magnitude (over the "
        "highest level), or the least squared error.",
        choices=SCALE_RULES,
    )
    symmetric: bool = setting(
        True,
        "Levels evenly about zero; else each step has a zero point of its own (int2 to int8, scale absmax or mse).",
    )
    references: tuple[str, ...] = setting(
        KINDS, "Kinds of reference to try, parted by commas or repeated.", choices=KINDS
    )
    start: str = setting(
        "auto",
        "Weights that a fit starts from: warm the trained ones, fresh random ones.",
        choices=("auto", "warm", "fresh"),
    )
    direct_steps: int = setting(
        20,
        "Optimiser steps for each direct and span reference, before the direct solver finishes it.",
        at_least=0,
    )
    ladder: bool = setting(
        True, "Fit each block in the other schemes too, briefly, to tell its effective bits."
    )
    screen: bool = setting(
        True,
        "Measure what costs far too much to decide anything on a part of the eval tokens alone; --no-screen measures "
        "every reference on all of them.",
    )
    matched_margin: float | None = setting(
        None,
        MARGIN,
        unset="auto",
        at_least=0,
        shared=True,
    )
    challenge_steps: int = setting(40, "Optimiser steps for each challenge reference.", at_least=0)
    paths: tuple[str, ...] = setting(
        ("direct", "last", "first-last"),
        "Target maps to peel the whole network along: direct, last, first-last, one written out such as [3,3,3,4], all "
        "(up to 8 layers), search, or none.",
        pattern=PATHS,
        expects="direct, last, first-last, all, search, none, or a map such as [3,3,3,4]",
        metavar="MAP",
        alone="none",
    )
    path_steps: int = setting(15, "Optimiser steps for each block of a peeled path.", at_least=0)
    head_steps: int = setting(60, "Optimiser steps for the light head on top of a path.", at_least=0)
    budget: str | None = setting(
        None,
        "Time for the peeled paths, such as 90s, 10m or 1h; what is left out is said.",
        unset="unlimited",
        pattern=DURATION,
        expects="a time such as 90s, 10m or 1h",
        metavar="TIME",
    )
    learning_rate: float | None = setting(
        None, "Step size of the optimiser; auto follows the kind of reference.", unset="auto", above=0
    )
    output: Path | None = setting(
        None, "HDF5 file to write the scored references to.", short="-o", metavar="FILE", unset="auto"
    )


@dataclass(frozen=True)
class ReportConfig:
    """How layers are judged, what the report shows, and what sets the exit code."""

    format: str = setting("table", "Format of the report.", short="-f", choices=FORMATS)
    output: Path | None = setting(
        None, "File to write the report to; - for stdout.", short="-o", metavar="FILE", unset="stdout"
    )
    fail_on: tuple[str, ...] = setting(
        ("broken", "surpassed", "matched", "untrained", "damaged", "unconverged", "red"),
        "Verdicts that flag, and so end with exit code 1; regressed: what got worse since the run before; none flags "
        "nothing.",
        choices=FLAGGABLE,
        alone="none",
    )
    exit_zero: bool = setting(False, "End with exit code 0 also where something is flagged.")
    top: int | None = setting(
        None, "Show only so many layers, the most under-optimised first.", unset="all", at_least=1
    )
    confidence: float = setting(
        0.95, "Confidence of the intervals, over all layers together.", above=0, below=1
    )
    matched_margin: float | None = setting(
        None,
        MARGIN,
        unset="auto",
        at_least=0,
        shared=True,
    )


@dataclass(frozen=True)
class TrackConfig:
    """Which audit to compare with, and where else the figures are written."""

    baseline: Path | None = setting(
        None,
        "Baseline that --write-baseline wrote: what regressed since flags, and so does a layer that is missing.",
        metavar="FILE",
    )
    history: Path | None = setting(
        None, "History (JSON lines) that every audit adds to, and that a report draws.", metavar="FILE"
    )
    log_to: tuple[str, ...] = setting(
        (),
        "Log the figures to tensorboard:DIR, wandb:PROJECT or mlflow:URI, repeatable.",
        unset="nowhere",
        pattern=LOG_TO,
        expects="tensorboard:DIR, wandb:PROJECT or mlflow:URI",
        metavar="KIND:WHERE",
    )


@dataclass(frozen=True)
class AuditConfig:
    """How an audit chains its stages, and what is kept between them."""

    output: Path | None = setting(
        None,
        "Directory for the files of the stages.",
        short="-o",
        metavar="DIR",
        unset="peel under XDG_CACHE_HOME",
    )
    resume: bool = setting(True, "Skip what an earlier run with the same settings has done.", shared=True)
    overwrite: bool = setting(False, "Do everything again, over what is there.", shared=True)
    wait: bool = setting(
        True,
        "Wait where another process works on the same files; --no-wait ends with exit code 3 instead.",
        shared=True,
    )
    dry_run: bool = setting(
        False, "Say what would be done, and the memory, disk and time it takes, and stop."
    )
    discard_activations: bool = setting(
        False, "Delete the states of a checkpoint once its references are fitted."
    )


@dataclass(frozen=True)
class WatchConfig:
    """How long a directory is watched, and how often."""

    every: str = setting(
        "30s",
        "Time between two looks.",
        pattern=DURATION,
        expects="a time such as 10s, 5m or 1h",
        metavar="TIME",
    )
    once: bool = setting(False, "Audit what is there and whole, and stop.")
    until_step: int | None = setting(
        None,
        "Stop once a checkpoint of this training step or a later one is audited.",
        unset="never",
        at_least=0,
    )
    max_idle: str | None = setting(
        None,
        "Stop once nothing has changed for so long, such as 30m.",
        unset="never",
        pattern=DURATION,
        expects="a time such as 10s, 5m or 1h",
        metavar="TIME",
    )


@dataclass(frozen=True)
class ConsoleConfig:
    """What is printed on stderr, and whether in colour."""

    quiet: bool = setting(False, "Say nothing but errors.", short="-q")
    verbose: bool = setting(False, "Say more, and show the traceback of an error.", short="-v")
    color: bool | None = setting(None, "Colours; auto means on a terminal without NO_COLOR.", unset="auto")


SECTIONS: tuple[type, ...] = (
    ExtractConfig,
    TrainedSchemeConfig,
    FitConfig,
    ReportConfig,
    TrackConfig,
    AuditConfig,
    WatchConfig,
    ConsoleConfig,
)


def section_name(section: type) -> str:
    """The YAML name of a section: `FitConfig` is `fit`, `TrainedSchemeConfig` is `trained_scheme`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", section.__name__.removesuffix("Config")).lower()


def parse_layers(layers: str | None, num_layers: int) -> tuple[int, ...]:
    """The layers that a list such as "1,4-6" names, sorted, counted from 1; None names all `num_layers`.

    Raises UsageError for an item that is no layer or range, or that does not lie within 1…num_layers.
    """
    if layers is None:
        return tuple(range(1, num_layers + 1))
    found: set[int] = set()
    for item in layers.split(","):
        match = re.fullmatch(LAYER_RANGE, item.strip())
        if match is None:
            raise UsageError(
                f"--layers {layers}: {item.strip()!r} is no layer or range; write a list such as 1,4-6"
            )
        low, high = int(match[1]), int(match[2] or match[1])
        if not 1 <= low <= high <= num_layers:
            raise UsageError(
                f"--layers {layers}: {item.strip()!r} does not lie within the layers 1-{num_layers} of "
                "the checkpoint; name layers in that range, the lower one first"
            )
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def parse_duration(text: str) -> float:
    """Seconds from a text such as 90, 90s, 10m or 1.5h. Raises UsageError for any other text."""
    match = re.fullmatch(DURATION, text)
    if match is None:
        raise UsageError(f"--budget {text}: expected a time such as 90s, 10m or 1h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"]


def cache_directory(env: Mapping[str, str]) -> Path:
    """The default directory for files: `peel` under XDG_CACHE_HOME (if that is absolute) or ~/.cache."""
    base = env.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "peel"
