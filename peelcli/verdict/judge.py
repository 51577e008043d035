"""The rules, from the evidence to one verdict a layer.

The best reference of a layer is chosen on `select` and read on `eval`; the decisions over all layers are corrected
together (Holm). What each verdict means, and why these rules, stands in the README under "What the verdicts mean".
"""

from __future__ import annotations

from dataclasses import replace

from peelcli.records import AuditResult, LayerVerdict, Run, Score
from peelcli.verdict import attributed, words
from peelcli.verdict.damaged_network import judge_damaged
from peelcli.verdict.distance_from_init import untouched
from peelcli.verdict.downstream import is_downstream, part_challenges, part_rescales
from peelcli.verdict.end_to_end_gains import best_rescale, most_rescaled, most_trained, peak_of, standing_out
from peelcli.verdict.evidence import (
    cheapest,
    distance,
    gather,
    gather_exchanges,
    gather_rollbacks,
    is_usable,
)
from peelcli.verdict.health import data_fit, is_damaged, is_untrained, losses_are_finite, mismatch
from peelcli.verdict.localize import narrowed
from peelcli.verdict.matched import find_matched, find_spanned
from peelcli.verdict.network import judge_network
from peelcli.verdict.policy import Policy
from peelcli.verdict.screening import screened_under
from peelcli.verdict.surpassed import find_proven, find_surpassed
from peelcli.verdict.table import Table, best_on_select


def judge(run: Run, policy: Policy | None = None) -> AuditResult:
    """One verdict for every audited layer, one for the network, and which of them the policy flags.

    policy: by default the one that the run's fit was screened under. Under another, no verdict rests on a reference
    that was measured on a part of `eval` where this policy would have measured it on all of it.
    """
    policy = policy or screened_under(run)
    network = judge_network(run, policy)
    found = _judge_layers(run, policy)
    copies = {f.layer: f for f in reversed(run.findings) if f.kind == "duplicate-layer" and f.layer}
    layers = tuple(words.with_duplicate(v, copies[v.layer]) if v.layer in copies else v for v in found)
    # Where the policy lets copies pass, what was measured of a copy still flags.
    flagged = tuple(
        v.layer for v, m in zip(layers, found, strict=True) if {v.verdict, m.verdict} & set(policy.fail_on)
    )
    network_flagged = any(f in policy.fail_on for f in (*network.flags, network.zone))
    return AuditResult(run, network, layers, flagged, network_flagged)


def _judge_layers(run: Run, policy: Policy) -> list[LayerVerdict]:
    broken = {f.layer: f for f in reversed(run.findings) if f.is_non_finite and f.layer}
    if any(f.is_non_finite for f in run.findings):
        return [words.broken(n, broken[n]) if n in broken else words.not_measured(n) for n in run.layers]
    return _measured(run, policy)


def _measured(run: Run, policy: Policy) -> list[LayerVerdict]:
    """What the losses say of every layer of a checkpoint whose files are sound."""
    if len(run.nll_eval) < policy.min_sequences:
        return [words.too_few(n, len(run.nll_eval), policy.min_sequences) for n in run.layers]
    if not losses_are_finite(run):
        return [words.no_loss(n) for n in run.layers]
    foreign = data_fit(run.nll_eval, run.entropy_eval, policy.foreign_gap) == "foreign"
    excess = mismatch(run.nll_eval, run.entropy_eval)
    evidence = gather(run, policy, foreign, excess)
    rollbacks = gather_rollbacks(run, policy, foreign, excess)
    exchanges = gather_exchanges(run, policy, foreign, excess)
    return _verdicts(Table(run, policy, evidence, rollbacks, exchanges, foreign))


def _verdicts(table: Table) -> list[LayerVerdict]:
    """One verdict a layer, in order."""
    if is_untrained(table.run, table.policy):
        best = {n: best_on_select(table.deciding[n]) for n in table.run.layers}
        return [words.untrained(n, best[n], table.facts(n)) for n in table.run.layers]
    if is_damaged(table.run, table.policy):
        return judge_damaged(table.run, table.policy, table.excess, table.facts)
    return [_finished(table, v) for v in _found(table)]


def _found(table: Table) -> list[LayerVerdict]:
    """What was found in each layer. A finding loses its flag to another layer's alone, which the reason names."""
    proven = find_proven(table)
    older = {e.score.reference.layer: e for e in proven if e.score.reference.is_rollback}
    every, behind_order = find_surpassed(table, proven)
    every_match = find_matched(table, set(every))
    excess = {} if table.foreign else table.excess
    standing, peak = standing_out(excess, table.policy), peak_of(excess)
    blamed = most_trained(excess, standing, {n: e.gap.mean for n, e in every.items()}, table.policy)
    behind = is_downstream(every, every_match, blamed, excess, table.worth, table.policy)
    surpassed = {n: e for n, e in every.items() if n not in behind}
    matched = {n: e for n, e in every_match.items() if n not in behind}
    challenged, behind_peak = part_challenges(standing, blamed, surpassed, every_match, peak, table.policy)
    rescaled, behind_rescale = part_rescales(
        most_rescaled(table.rescales, table.alpha), {**surpassed, **challenged}, table.policy
    )
    flagged = {**matched, **rescaled, **challenged, **surpassed}
    spanned, behind_span = find_spanned(
        table, {n: n for n in flagged} | {n: b.hurt for n, b in behind.items() if n not in flagged}
    )
    behind_order = {
        n: replace(b, hurt=behind[b.hurt].hurt) if b.hurt in behind else b for n, b in behind_order.items()
    }
    behind = {**behind_span, **behind_rescale, **behind_peak, **behind_order, **behind}
    out = []
    for layer in table.run.layers:
        facts = table.facts(layer, every.get(layer))
        if layer in surpassed:
            verdict = words.surpassed(layer, surpassed[layer], facts)
            verdict = words.with_rescale(verdict, best_rescale(table.rescales, layer))
            out.append(words.with_rollback(verdict, older.get(layer)))
        elif layer in challenged:
            verdict = words.challenged(layer, challenged[layer], facts)
            out.append(attributed.with_match(verdict, every_match.get(layer)))
        elif layer in rescaled:
            verdict = words.rescaled(layer, rescaled[layer], facts)
            out.append(attributed.with_match(verdict, every_match.get(layer)))
        elif layer in matched or layer in spanned:
            verdict = words.matched(layer, matched.get(layer) or spanned[layer], facts)
            out.append(attributed.with_behind(verdict, behind.get(layer)))
        elif layer in behind:
            out.append(attributed.behind_another(layer, behind[layer], facts))
        else:
            out.append(_unflagged(table, layer, facts, table.left_open(layer, {*flagged, *spanned})))
    return out


def _finished(table: Table, verdict: LayerVerdict) -> LayerVerdict:
    found = table.by_layer[verdict.layer]
    drops = [e for e in found if e.score.reference.is_drop and e.score.reference.sublayer]
    verdict = narrowed(_in_rank(verdict, table.policy), table.run, drops, table.rescales, table.policy)
    return words.with_untouched(verdict, untouched(table.run, verdict.layer))


def _unflagged(table: Table, layer: int, facts: words.Facts, left: Score | None) -> LayerVerdict:
    """Effective only where every reference costs clearly more, and none might have cost less with more steps.

    left: one that was measured on too little to say so.
    """
    if left is not None:
        return words.measured_on_part(layer, left, table.run, table.policy, facts)
    evidence = [e for e in table.lighter[layer] if not e.vacuous]
    if not evidence:
        fitted = [
            s
            for s in table.run.scores
            if s.reference.layer == layer and s.reference.kind not in ("exchange", "rollback")
        ]
        diverged = sum(not is_usable(s) for s in fitted)
        return words.unmeasured(layer, diverged, facts)
    factor = table.policy.unsettled_factor
    straddling = [e for e in evidence if e.cost.low <= e.margin]
    unsettled = [e for e in evidence if not e.score.fit.converged and e.cost.mean < factor * e.margin]
    closest = min(straddling or unsettled or evidence, key=lambda e: (distance(e), *cheapest(e)))
    if straddling:
        return words.straddles(layer, closest, facts)
    if unsettled:
        return words.unsettled(layer, closest, facts)
    return words.effective(layer, closest, facts)


def _in_rank(verdict: LayerVerdict, policy: Policy) -> LayerVerdict:
    """The layers that something was found in come first, whatever else is measured of the others."""
    if verdict.score is None:
        return verdict
    rank = max if verdict.verdict in ("surpassed", "matched") else min
    return replace(verdict, score=rank(verdict.score, policy.found_score))
