"""What changed between two audits of one network on the same tokens, and which of it is a regression.

Two nights of one run never measure the same: every block has moved, and what each reference costs has moved with it.
So a layer has regressed only where the change is beyond chance (paired by sequence, Holm over the layers) and matters
(shares of what the same reference cost before): where it is flagged and was not, where the reference that decides
costs less than half of what it did, or where it has not moved at all while others have. What the other layers' own
references cost less than before is taken off first: a change that all share is the network's, and blames no layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from peelcli.records import AuditResult, Comparison, LayerChange, LayerVerdict, Reference, Score
from peelcli.verdict.evidence import group_of, is_usable, shared_rows
from peelcli.verdict.policy import Policy
from peelcli.verdict.statistics import holm, p_greater, paired_interval
from peelcli.verdict.words import stand_in

LAYER_FLAGS = ("broken", "surpassed", "matched")  # where the policy names none
_FIT_TRAITS = (
    *("scheme", "granularity", "group_size", "scale", "symmetric"),
    *("start", "direct_steps", "challenge_steps", "learning_rate"),
)
CHECK = "See whether it was frozen, restored from elsewhere, or its learning rate or gradient lost."


def with_comparisons(
    results: Sequence[AuditResult], policy: Policy, baseline: AuditResult | None = None
) -> list[AuditResult]:
    """The results, oldest first, each with its change since the one before; the newest against `baseline`, if given.

    Where the policy flags what regressed, that of the newest counts: its layers are flagged and say so in a note, and
    a layer that is missing gets a verdict of its own. Networks of another shape are not compared.
    """
    out: list[AuditResult] = []
    for number, result in enumerate(results, start=1):
        newest = number == len(results)
        against_baseline = newest and baseline is not None
        before = baseline if against_baseline else out[-1] if out else None
        if before is not None and is_alike(before, result):
            result = _compared(before, result, policy, against_baseline)
            if newest and "regressed" in policy.fail_on:
                result = _flagged(result)
        out.append(result)
    return out


def is_alike(one: AuditResult, other: AuditResult) -> bool:
    """Whether two results are of networks that can be compared layer by layer."""
    families = {one.run.family, other.run.family} - {""}  # a broken checkpoint does not tell its own
    return one.run.num_layers == other.run.num_layers and len(families) < 2


def _flagged(result: AuditResult) -> AuditResult:
    assert result.comparison is not None
    reasons = {c.layer: c.reason for c in result.comparison.layers if c.status in ("regressed", "missing")}
    layers = [
        replace(v, notes=(*v.notes, f"Regressed: {reasons[v.layer]}")) if v.layer in reasons else v
        for v in result.layers
    ]
    there = {v.layer for v in layers}
    advice = "Audit it again (--layers), or write a new baseline without it (--write-baseline)."
    layers += [LayerVerdict(n, "undecided", why, advice) for n, why in reasons.items() if n not in there]
    return replace(
        result,
        layers=tuple(sorted(layers, key=lambda v: v.layer)),
        flagged=tuple(sorted({*result.flagged, *reasons})),
        network_flagged=result.network_flagged or bool(result.comparison.new_flags),
    )


@dataclass(frozen=True)
class _Pair:
    """One reference measured on both nights: its losses, paired by sequence, all (n_seq,)."""

    reference: Reference
    decides: bool  # whether it decided on the layer now
    gap_before: np.ndarray
    gap_after: np.ndarray
    cost_before: np.ndarray
    cost_after: np.ndarray
    shared: float  # what share of its cost the other layers' references have kept in the median, 1 at most


def _compared(before: AuditResult, after: AuditResult, policy: Policy, is_baseline: bool) -> AuditResult:
    pairs = _Pairs(before, after)
    unmoved = _unmoved(before, after)
    then = {v.layer: v for v in before.layers}
    now = {v.layer: v for v in after.layers}
    found = {n: pairs.of(now[n], then[n]) for n in now if n in then}
    p_worse = {n: _p_worse(p, _is_new(then[n], now[n], policy), policy) for n, p in found.items() if p}
    p_better = {n: _p_better(p, policy) for n, p in found.items() if p}
    worse, better = (_holm(p_values, policy) for p_values in (p_worse, p_better))
    changes = []
    for layer in sorted({*then, *now}):
        was, is_now, pair = then.get(layer), now.get(layer), found.get(layer)
        stopped = layer in unmoved and layer not in before.unmoved
        status, reason = _status(was, is_now, pair, (layer in worse, layer in better), stopped, policy)
        verdicts = (was.verdict if was else None, is_now.verdict if is_now else None)
        change = LayerChange(layer, status, *verdicts, reason)
        changes.append(_with_figures(change, pair, policy) if pair else change)
    ce = None
    if pairs.are_paired:
        ce = paired_interval(np.subtract(after.run.nll_eval, before.run.nll_eval).tolist(), policy.confidence)
    comparison = Comparison(
        checkpoint=before.run.checkpoint,
        checkpoint_id=before.run.checkpoint_id,
        step=before.run.step,
        is_baseline=is_baseline,
        layers=tuple(changes),
        ce_change=ce.mean if ce else None,
        ce_change_interval=(ce.low, ce.high) if ce else None,
        new_flags=_new_network_flags(before, after),
        notes=tuple(_notes(before, after, pairs)),
    )
    return replace(after, comparison=comparison, unmoved=unmoved)


def _with_figures(change: LayerChange, pair: _Pair, policy: Policy) -> LayerChange:
    interval = paired_interval((pair.gap_after - pair.gap_before).tolist(), policy.confidence)
    ends = (interval.low, interval.high)
    return replace(change, gap_change=interval.mean, gap_change_interval=ends, reference=pair.reference)


def _status(
    was: LayerVerdict | None,
    now: LayerVerdict | None,
    pair: _Pair | None,
    shown: tuple[bool, bool],
    stopped: bool,
    policy: Policy,
) -> tuple[str, str]:
    """One of CHANGES, and why. shown: whether the figures are worse, and whether they are better, beyond chance."""
    worse, better = shown
    if now is None:
        return "missing", "it was audited then, and is not now."
    if was is None:
        return "new", "it was not audited then."
    if _is_new(was, now, policy) and (worse or pair is None or not pair.decides):
        return (
            "regressed",
            f"{now.verdict} now, and was {was.verdict}. {_figures(pair, policy) if worse else ''}".strip(),
        )
    if stopped:
        return "regressed", f"byte for byte what it was then, while other layers have moved. {CHECK}"
    if worse and pair is not None and not _is_new(was, now, policy):
        return "regressed", f"{_figures(pair, policy)} {CHECK}"
    if was.verdict in _flags(policy) and now.verdict == "effective":
        return "better", f"was {was.verdict}, and is effective now."
    if better and pair is not None:
        return "better", _figures(pair, policy)
    if _is_new(was, now, policy):
        return (
            "same",
            f"{now.verdict} now, and was {was.verdict}: its figures have not changed enough to call that new.",
        )
    return "same", ""


def _figures(pair: _Pair | None, policy: Policy) -> str:
    """What the reference cost, and costs, with the interval of the change."""
    if pair is None:
        return ""
    change = paired_interval((pair.cost_after - pair.cost_before).tolist(), policy.confidence)
    return (
        f"With {stand_in(pair.reference)} the cost is {float(pair.cost_after.mean()):+.4f} nats, and was "
        f"{float(pair.cost_before.mean()):+.4f} ({change.mean:+.4f}, {change.low:+.4f} to {change.high:+.4f})."
    )


def _flags(policy: Policy) -> tuple[str, ...]:
    """The verdicts that are flags here: those of the policy, or where it names none those that are by default."""
    named = tuple(v for v in (*LAYER_FLAGS, "undecided") if v in policy.fail_on)
    return named or LAYER_FLAGS


def _is_new(was: LayerVerdict, now: LayerVerdict, policy: Policy) -> bool:
    return now.verdict in _flags(policy) and was.verdict not in _flags(policy)


def _p_worse(pair: _Pair, is_new: bool, policy: Policy) -> float:
    """That the reference costs no less than before by what a new flag, or growth alone, asks for."""
    share, floor = (
        (policy.new_flag_share, policy.surpassed_floor)
        if is_new
        else (policy.grown_share, policy.grown_floor)
    )
    before = pair.cost_before * (pair.shared if pair.cost_before.mean() > 0 else 1.0)
    fall = before - pair.cost_after
    part = share * np.sign(before.mean()) * before
    return max(p_greater(fall.tolist(), floor), p_greater((fall - part).tolist()))


def _p_better(pair: _Pair, policy: Policy) -> float:
    rise = pair.cost_after - pair.cost_before
    part = policy.grown_share * np.sign(pair.cost_before.mean()) * pair.cost_before
    return max(p_greater(rise.tolist(), policy.grown_floor), p_greater((rise - part).tolist()))


def _holm(p_values: dict[int, float], policy: Policy) -> set[int]:
    rejected = holm(list(p_values.values()), 1.0 - policy.confidence)
    return {layer for layer, is_shown in zip(p_values, rejected, strict=True) if is_shown}


class _Pairs:
    """The references that two audits have in common."""

    def __init__(self, before: AuditResult, after: AuditResult) -> None:
        self.before, self.after = before, after
        runs = (before.run, after.run)
        losses = [*runs[0].nll_eval, *runs[1].nll_eval]
        self.are_paired = (
            bool(runs[0].data_hash)
            and runs[0].data_hash == runs[1].data_hash
            and len(runs[0].nll_eval) == len(runs[1].nll_eval) > 1
            and bool(np.isfinite(losses).all())
        )
        self.fitted_alike = _fit_traits(before) == _fit_traits(after)
        self.foreign = "foreign" in (before.network.data_fit, after.network.data_fit)
        kept = [{s.reference: s for s in run.scores if is_usable(s)} for run in runs]
        self.both: dict[Reference, tuple[Score, Score]] = {
            r: (kept[0][r], s)
            for r, s in kept[1].items()
            if self.are_paired and r in kept[0] and (self.fitted_alike or r.is_drop)
        }

    def of(self, now: LayerVerdict, then: LayerVerdict) -> _Pair | None:
        """What to compare of a layer: the reference that decides now, else the one that did, else the dropped block."""
        dropped = Reference("identity", now.layer, now.layer)
        for reference in (now.reference, then.reference, dropped):
            if reference in self.both:
                assert reference is not None
                return self._pair(reference, reference == now.reference, now.verdict)
        return None

    def _pair(self, reference: Reference, decides: bool, verdict: str) -> _Pair:
        gap_before, gap_after = self._gaps(reference)
        # On foreign text a loss says little of a layer, and what it does to the predictions says all (see `evidence`).
        by_divergence = self.foreign and verdict != "surpassed"
        cost_before, cost_after = self._costs(reference, by_divergence)
        mine = group_of(self.both[reference][0])
        kept = []
        for other, (score, _) in self.both.items():
            if other.layer != reference.layer and group_of(score) == mine:
                theirs = [float(cost.mean()) for cost in self._costs(other, by_divergence)]
                if theirs[0] > 0:
                    kept.append(theirs[1] / theirs[0])
        shared = float(np.clip(np.median(kept), 0.0, 1.0)) if len(kept) > 1 else 1.0
        return _Pair(reference, decides, gap_before, gap_after, cost_before, cost_after, shared)

    def _gaps(self, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
        then, now = self.both[reference]
        return self._on_both(
            reference,
            np.subtract(then.beside(self.before.run.nll_eval), then.nll_eval),
            np.subtract(now.beside(self.after.run.nll_eval), now.nll_eval),
        )

    def _costs(self, reference: Reference, by_divergence: bool) -> tuple[np.ndarray, np.ndarray]:
        if by_divergence:
            then, now = self.both[reference]
            return self._on_both(reference, np.asarray(then.kl_eval), np.asarray(now.kl_eval))
        before, after = self._gaps(reference)
        return -before, -after

    def _on_both(
        self, reference: Reference, then: np.ndarray, now: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the sequences that both audits measured the reference on: one may have needed fewer."""
        mine, theirs = shared_rows(len(self.after.run.nll_eval), *self.both[reference])
        return then[mine], now[theirs]


def _fit_traits(result: AuditResult) -> list[object]:
    """What must be the same for the losses of fitted references to be comparable."""
    settings = result.run.config.get("fit")
    return [settings.get(name) for name in _FIT_TRAITS] if isinstance(settings, dict) else []


def _unmoved(before: AuditResult, after: AuditResult) -> tuple[int, ...]:
    """Layers whose weights are what they were, in a network of which others' are not."""
    then, now = before.run.layer_hashes, after.run.layer_hashes
    both = [n for n in after.run.layers if str(n) in then and str(n) in now]
    same = tuple(n for n in both if then[str(n)] == now[str(n)])
    return same if len(same) < len(both) else ()


def _new_network_flags(before: AuditResult, after: AuditResult) -> tuple[str, ...]:
    """Flags of the network that it did not have; of the paths' only those whose intervals lie apart."""
    then, now = before.network, after.network
    found = [f for f in now.flags if f not in then.flags and f != "unconverged"]
    if then.bounds is None or now.bounds is None:
        return tuple(found)
    if "unconverged" in now.flags and "unconverged" not in then.flags:
        apart = now.bounds.head_interval[0] > then.bounds.head_interval[1]
        found += ["unconverged"] if apart else []
    if now.zone == "red" and then.zone not in ("red", None) and now.bounds.last and then.bounds.last:
        apart = now.bounds.last.gap_interval[0] > then.bounds.last.gap_interval[1]
        found += ["red"] if apart else []
    return tuple(found)


def _notes(before: AuditResult, after: AuditResult, pairs: _Pairs) -> list[str]:
    notes = []
    if before.run.checkpoint_id == after.run.checkpoint_id:
        notes.append("Both hold the same weights, byte for byte.")
    if not pairs.are_paired:
        notes.append(
            "The losses of the two are not there sequence by sequence: only the verdicts are compared."
        )
    elif not pairs.fitted_alike:
        notes.append(
            "The references of the two were fitted with other settings: only dropped blocks and sublayers are compared."
        )
    known = [n for n in after.unmoved if n in before.unmoved]
    if known:
        notes.append(f"Had not moved before either: layers {', '.join(map(str, known))}.")
    return notes
