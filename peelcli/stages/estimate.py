"""What an audit will read, hold, write and take, said before it begins (`--dry-run`)."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Generator
from pathlib import Path

import torch

from peelcli.checkpoint.layers import group_by_layer
from peelcli.checkpoint.plain import plain_numel
from peelcli.checkpoint.structure import layers_of
from peelcli.config import ExtractConfig, FitConfig, TrainedSchemeConfig, parse_layers
from peelcli.fitting.fit_to_loss import CHALLENGE_BATCH
from peelcli.fitting.fit_to_loss import KINDS as END_TO_END
from peelcli.fitting.paths import wanted_maps
from peelcli.fitting.target_maps import count_fits
from peelcli.records.estimate import Estimate
from peelcli.records.progress import Progress
from peelcli.references.plan import ALL_PAIRS, BIT_WIDTH_SWEEP
from peelcli.runtime.machine import available_memory
from peelcli.scoring.trained_pass import stored_states
from peelcli.scoring.two_stage import PART
from peelcli.stages.inspection import open_and_scan
from peelcli.stages.open_model import num_threads
from peelcli.stages.workspace import Workspace
from peelcli.storage.activations import states_nbytes

_IMPORTS = 6e8  # bytes that Python, torch and transformers take before any weight is read
# A weight takes so much in `direct` and `span` references of 1.6 bits (whole, in parts, and twice as spans)…
_LOW_BIT_NBYTES = 1.0
_LADDER_NBYTES = 2.5  # …and in the further schemes of the ladder, some 19 bits in all
_EFFICIENCY = 0.3  # of the rate of a large matrix product, reached by small blocks with attention


def run_estimate(
    path: Path,
    extract: ExtractConfig,
    fit: FitConfig,
    workspace: Workspace,
    num_earlier: int = 0,
    trained: TrainedSchemeConfig | None = None,
) -> Generator[Progress, None, Estimate]:
    """Estimate the audit of one checkpoint; it is scanned, and nothing of it is built or run.

    num_earlier: how many earlier checkpoints of its run will serve for `rollback`.
    """
    opened = yield from open_and_scan(path, workspace, trained)
    files, config = opened.files, opened.files.config
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    num_layers = layers_of(config)
    layers = parse_layers(extract.layers, num_layers)
    width = next(
        (int(text[k]) for k in ("hidden_size", "n_embd", "d_model") if isinstance(text.get(k), int)), 0
    )
    vocab = int(text.get("vocab_size") or 0)
    members, _ = group_by_layer(files, num_layers)
    packing = opened.precision.running.packing
    numel = plain_numel(files, packing)
    sizes = [sum(numel.get(i.name, 0) for i in m.values()) for m in members.values()]
    block, inside = max(sizes, default=0), sum(sizes)
    outside = sum(numel.values()) - inside
    dtype = "float32" if extract.dtype == "auto" else extract.dtype
    itemsize = 4 if dtype == "float32" else 2
    tokens = extract.fit_tokens + extract.select_tokens + extract.eval_tokens
    measured = extract.select_tokens + extract.eval_tokens
    seq_len = extract.seq_len or 256
    rows = max(1, tokens // seq_len)
    states = states_nbytes(len(stored_states(num_layers, layers)), rows, seq_len, width, dtype)
    older = num_earlier if "rollback" in fit.references else 0
    # The schemes of the ladder are measured on a part of `eval` alone; what else such a part settles is not known yet.
    ladder = len(BIT_WIDTH_SWEEP) * extract.eval_tokens / PART / measured if fit.ladder else 0.0
    pairs = len(layers) * (len(layers) - 1) // 2 if num_layers <= ALL_PAIRS else len(layers) - 1
    candidates = math.ceil(len(layers) * (12 + ladder + older)) + pairs
    scratch = 2 * candidates * measured * width * itemsize
    unpacked = itemsize * sum(numel.values()) if packing is not None else 0
    # A fit holds latent weights, gradients and two moments; a batch's logits and a layer's states come on top.
    memory = _IMPORTS + itemsize * outside + 6 * 4 * block + tokens * width * itemsize + 4 * 2**26
    has_room = 4 * itemsize * inside <= (available_memory() or 0)
    challenge, rescale = (has_room and kind in fit.references for kind in END_TO_END)
    memory += 4 * itemsize * inside if challenge or rescale else 0
    # What is fitted is kept as parts, and then in the fit. Of the peeled paths the best and one more are.
    asked = wanted_maps(fit.paths, num_layers).maps if len(layers) == num_layers else ()
    low_bit = (_LADDER_NBYTES if fit.ladder else 0.0) + _LOW_BIT_NBYTES if "direct" in fit.references else 0.0
    each = itemsize * (older + challenge) + low_bit
    kept = round(2 * each * inside * len(layers) / num_layers)
    kept += itemsize * block * (count_fits(asked) + min(len(asked), 2) * num_layers)
    batch = CHALLENGE_BATCH * seq_len
    # The direct solver, which finishes a fit, costs about as much as 16 steps.
    steps = (fit.direct_steps + 16) * (3 + 2 + (5 / 3 if fit.ladder else 0))
    flops = 2.0 * inside * tokens + 6.0 * block * batch * steps * len(layers)
    flops += (
        2.0 * block * measured * candidates * num_layers / 2 + 2.0 * vocab * width * measured * candidates
    )
    flops += (
        6.0 * (inside / 2 + vocab * width) * batch * fit.challenge_steps * len(layers) if challenge else 0.0
    )
    # Forward once and backward twice, for all layers together.
    flops += 10.0 * (inside + vocab * width) * extract.fit_tokens if rescale else 0.0
    yield Progress("plan", 0, 1, "measuring this machine")
    seconds = 10.0 + flops / (_EFFICIENCY * _rate(num_threads(extract)))
    return Estimate(
        path,
        num_layers,
        layers,
        tokens,
        opened.scan.total_nbytes,
        memory,
        available_memory(),
        states + scratch + kept + unpacked,
        shutil.disk_usage(workspace.directory).free,
        seconds,
    )


def _rate(threads: int) -> float:
    """Floating-point operations a second of a matrix product here."""
    torch.set_num_threads(threads)
    a = torch.randn(512, 512)
    (a @ a).sum()
    began = time.perf_counter()
    for _ in range(8):
        a = (a @ a).clamp(-1, 1)
    return 8 * 2 * 512**3 / max(time.perf_counter() - began, 1e-6)
