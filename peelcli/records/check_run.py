"""Check that a run read from a file is plausible: counts, ranges, lengths and known names.

Everything here is compared with something else in the same run; a file that contradicts itself is damaged. ValueError
says where, what was expected and what was found.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peelcli.records import (
    KINDS,
    SUBLAYERS,
    VERDICTS,
    AuditResult,
    FitOutcome,
    PathScore,
    Reference,
    Run,
    Score,
)
from peelcli.records.schemes import GRANULARITIES, SCHEMES

DTYPES = ("float32", "bfloat16", "float16")
PARTS = ("fit", "select", "eval")
# Numbers that may be infinite or NaN: shares and sizes of what has overflowed, which nothing is decided by.
UNBOUNDED = ("fvu_fit", "fvu_eval", "fvu", "unexplained", "weight_rms", "vector_travel")
STARTS = ("none", "warm", "fresh", "trained", "earlier")
_OF_LAYERS = ("identity", "span", "exchange")  # kinds that may reach over several layers
_WITH_SCHEME = ("direct", "span")
_MOST_LAYERS, _MOST_SEQUENCES, _LARGEST = 100_000, 2**24, 2**53
_MOST_BITS = 64.0
_LARGEST_LOSS = 3.5e38  # nats; no loss in float32 is larger
_ROUNDING = 1e-3  # nats: by how much a loss of nothing may lie below 0, or a uniform entropy above its limit


def check_run(run: Run, *, is_slim: bool = False) -> None:
    """Raise ValueError unless `run` is plausible. is_slim: the run of a baseline, without losses on `select`."""
    check_network(run)
    n_select, n_eval = len(run.nll_select), len(run.nll_eval)
    for part, count in (("select", n_select), ("eval", n_eval)):
        if not (is_slim and part == "select"):
            _equal(f"tokens.{part}", run.tokens[part], count * run.seq_len)
    if not is_slim:
        _equal("the length of entropy_eval", len(run.entropy_eval), n_eval)
    _losses("nll_select", run.nll_select)
    _losses("nll_eval", run.nll_eval)
    _losses("entropy_eval", run.entropy_eval, math.log(run.vocab_size) + _ROUNDING)
    _require(run.scheme in SCHEMES, "scheme", f"one of {', '.join(SCHEMES)}", run.scheme)
    _require(run.granularity in ("", *GRANULARITIES), "granularity", "a known one", run.granularity)
    _require(run.group_size is None or run.group_size >= 1, "group_size", "at least 1", run.group_size)
    keys = [score.reference.key for score in run.scores]
    _require(len(set(keys)) == len(keys), "references", "each once", f"{len(keys) - len(set(keys))} twice")
    for score in run.scores:
        _check_score(score, run, 0 if is_slim else n_select)
    if run.paths is not None:
        _check_paths(run)


def check_network(run: Run) -> None:
    """Raise ValueError unless the run's description of checkpoint and tokens is plausible, measured or not."""
    _within("num_layers", run.num_layers, 1, _MOST_LAYERS)
    _within("vocab_size", run.vocab_size, 1, 2**31)
    _within("seq_len", run.seq_len, 1, 2**31)
    _require(abs(run.seed) < 2**63, "seed", "a number of 64 bits", run.seed)
    _require(set(run.tokens) == set(PARTS), "tokens", "those of fit, select and eval", sorted(run.tokens))
    for part, count in run.tokens.items():
        _within(f"tokens.{part}", count, 0, _LARGEST)
        _equal(f"tokens.{part} beyond whole sequences", count % run.seq_len, 0)
        _within(f"sequences of {part}", count // run.seq_len, 0, _MOST_SEQUENCES)
    _within("step", 0 if run.step is None else run.step, 0, _LARGEST)
    _layers("layers", run.layers, run.num_layers)
    _require(run.dtype in ("", *DTYPES), "dtype", f"one of {', '.join(DTYPES)}", run.dtype)
    _number("unigram_ce", run.unigram_ce, 0.0, math.log(run.vocab_size) + _ROUNDING)
    _number("seconds", run.seconds, 0.0, math.inf)
    for name in ("layer_bits", "weight_rms", "vector_travel"):
        _require(len(getattr(run, name)) in (0, run.num_layers), f"the length of {name}", str(run.num_layers),
                 len(getattr(run, name)))  # fmt: skip
    for bits in run.layer_bits:
        _number("layer_bits", bits, 0.0, _MOST_BITS)
    for sizes in (*run.weight_rms, *run.vector_travel):
        for name, value in (item for part in sizes.values() for item in part.items()):
            _require(value >= 0, f"the size of {name}", "0 or more", value)  # NaN is neither
    known = {str(n) for n in range(1, run.num_layers + 1)}
    _require(
        set(run.layer_hashes) <= known,
        "layer_hashes",
        "numbers of layers",
        sorted(set(run.layer_hashes) - known),
    )
    for finding in run.findings:
        if finding.layer is not None:
            _within("the layer of a finding", finding.layer, 1, run.num_layers)
    for module in run.quantized.modules if run.quantized else ():
        if module.layer is not None:
            _within(f"the layer of {module.name}", module.layer, 1, run.num_layers)
        _number(f"the bits of {module.name}", module.num_bits, 0.0, _MOST_BITS)


def check_reference(reference: Reference, num_layers: int) -> None:
    """Raise ValueError unless the reference is possible in a network of `num_layers` layers."""
    r = reference
    _require(r.kind in KINDS, "kind", f"one of {', '.join(KINDS)}", r.kind)
    where = f"reference {r.key}"
    _within(f"{where}, layer", r.layer, 1, num_layers)
    _within(f"{where}, target", r.target, r.layer, num_layers)
    _require(r.target == r.layer or r.kind in _OF_LAYERS, f"{where}, target", str(r.layer), r.target)
    _require(r.sublayer in (None, *SUBLAYERS), f"{where}, sublayer", " or ".join(SUBLAYERS), r.sublayer)
    if r.kind in _WITH_SCHEME:
        _require(r.scheme in SCHEMES, f"{where}, scheme", f"one of {', '.join(SCHEMES)}", r.scheme)
    else:
        _require(r.scheme is None, f"{where}, scheme", "none", r.scheme)
    _require(r.group_size is None or r.group_size >= 1, f"{where}, group_size", "at least 1", r.group_size)
    _number(f"{where}, bits", r.bits, 0.0, _MOST_BITS)
    _require(
        (r.origin_id is None) == (r.kind != "rollback"),
        f"{where}, origin_id",
        "that of a rollback",
        r.origin_id,
    )
    _within(f"{where}, origin_step", r.origin_step or 0, 0, _LARGEST)


def check_outcome(fit: FitOutcome) -> None:
    """Raise ValueError unless the fit's figures are plausible."""
    _require(fit.start in STARTS, "start", f"one of {', '.join(STARTS)}", fit.start)
    _within("steps", fit.steps, 0, _LARGEST)
    _number("seconds", fit.seconds, 0.0, math.inf)


def check_result(result: AuditResult) -> None:
    """Raise ValueError unless the verdicts of a baseline match its run."""
    run = result.run
    check_run(run, is_slim=True)
    _layers("flagged", result.flagged, run.num_layers)
    _layers("layers", [v.layer for v in result.layers], run.num_layers)
    for verdict in result.layers:
        where = f"the verdict on layer {verdict.layer}"
        _require(verdict.verdict in VERDICTS, where, f"one of {', '.join(VERDICTS)}", verdict.verdict)
        if verdict.reference is not None:
            check_reference(verdict.reference, run.num_layers)


def check_about(about: Mapping[str, Any], run: Run) -> None:
    """Raise ValueError unless an extraction's description has everything beyond `run` that a fit needs."""
    rows = about["rows"]
    for part in PARTS:
        _equal(f"tokens.{part}", run.tokens[part], _whole(f"rows.{part}", rows[part]) * run.seq_len)
        _within(f"rows.{part}", rows[part], 1, _MOST_SEQUENCES)
    for name in ("layer_bits", "layer_grids", "matrix_grids"):
        _equal(f"the length of {name}", len(about[name]), run.num_layers)
    for matrices in about["matrix_grids"]:
        _require(isinstance(matrices, dict), "matrix_grids", "an object", type(matrices).__name__)
    grids = [
        *about["layer_grids"],
        *(grid for matrices in about["matrix_grids"] for grid in matrices.values()),
    ]
    for grid in grids:
        scheme, size = grid or ("fp", None)
        _require(scheme in SCHEMES, "the scheme of a grid", f"one of {', '.join(SCHEMES)}", scheme)
        _require(size is None or _whole("a group size", size) >= 1, "a group size", "at least 1", size)
    for name in ("checkpoint", "checkpoint_id", "device", "dtype"):
        _require(isinstance(about[name], str), name, "text", about[name])


def _check_score(score: Score, run: Run, n_select: int) -> None:
    check_reference(score.reference, run.num_layers)
    check_outcome(score.fit)
    where, n_eval = f"reference {score.reference.key}", len(run.nll_eval)
    _lengths(where, "nll_select", score.nll_select, (0, n_select))
    found = len(score.nll_eval)
    _require(0 < found <= n_eval and found == -(-n_eval // score.stride(n_eval)), f"{where}, the length of nll_eval",
             f"{n_eval} or an even part of it", found)  # fmt: skip
    _lengths(where, "kl_eval", score.kl_eval, (found,))
    for name in ("nll_select", "nll_eval", "kl_eval"):
        _losses(f"{where}, {name}", getattr(score, name))
    # Where the loss has overflowed, the same predictions diverge without limit.
    if not all(map(math.isfinite, score.nll_eval)):
        for nll, kl in zip(score.nll_eval, score.kl_eval, strict=True):
            _require(math.isfinite(nll) or not math.isfinite(kl), f"{where}, nll_eval", "a finite loss", nll)


def _check_paths(run: Run) -> None:
    paths = run.paths
    assert paths is not None
    _within("paths.num_fits", paths.num_fits, 0, _LARGEST)
    _number("paths.seconds", paths.seconds, 0.0, math.inf)
    _equal("the length of paths.schemes", len(paths.schemes), run.num_layers)
    _equal("the length of the control's map", len(paths.control.target_map), 0)
    maps = [score.target_map for score in paths.scores]
    _require(len(set(maps)) == len(maps), "paths", "each map once", f"{len(maps) - len(set(maps))} twice")
    for score in paths.scores:
        _equal("the length of a map", len(score.target_map), run.num_layers)
    for score in (paths.control, *paths.scores):
        _check_path(score, run)


def _check_path(score: PathScore, run: Run) -> None:
    where = f"the path {list(score.target_map)}"
    for target in score.target_map:
        _within(f"{where}, a target", target, 1, run.num_layers)
    for fit in score.fits:
        check_outcome(fit)
    for name, own in (("nll_select", run.nll_select), ("nll_eval", run.nll_eval)):
        _lengths(where, name, getattr(score, name), (len(own),))
        _losses(f"{where}, {name}", getattr(score, name))


def _layers(name: str, layers: Sequence[int], num_layers: int) -> None:
    _require(list(layers) == sorted(set(layers)), name, "numbers in ascending order", list(layers)[:20])
    for layer in layers:
        _within(name, layer, 1, num_layers)


def _lengths(where: str, name: str, values: Sequence[float], allowed: Collection[int]) -> None:
    expected = " or ".join(str(n) for n in sorted(set(allowed)))
    _require(len(values) in allowed, f"{where}, the length of {name}", expected, len(values))


def _losses(name: str, values: Sequence[float], most: float = _LARGEST_LOSS) -> None:
    """Raise ValueError unless losses are at least 0. Infinite and NaN losses are allowed; readers handle them."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        _number(name, min(finite), -_ROUNDING, most)
        _number(name, max(finite), -_ROUNDING, most)
    if len(finite) < len(values):
        _require(-math.inf not in values, name, "0 or more", -math.inf)


def _whole(name: str, value: Any) -> int:
    _require(type(value) is int, name, "a whole number", value)
    return int(value)


def _number(name: str, value: float, least: float, most: float) -> None:
    _require(least <= value <= most and value < math.inf, name, f"a number from {least:g} to {most:g}", value)


def _within(name: str, value: int, least: int, most: int) -> None:
    _require(least <= value <= most, name, f"{least} to {most}", value)


def _equal(name: str, found: int, expected: int) -> None:
    _require(found == expected, name, str(expected), found)


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        shown = repr(found)
        raise ValueError(f"{name}: expected {expected}, found {shown[:60]}{'...' * (len(shown) > 60)}")
