"""Laws that hold for any run: the sequence is the unit, comparisons are paired, and words do not outrun figures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import (
    BITS,
    PARTS,
    Effect,
    challenge,
    changed,
    direct,
    exchange,
    foreign,
    identity,
    idle,
    measure,
    rescale,
    rollback,
    sound,
    span,
)

from peelcli.records import VERDICTS, Run
from peelcli.verdict import Policy, judge

costs = st.sampled_from([-0.3, -0.02, -0.003, 0.0, 0.0005, 0.01, 0.05, 0.2, 1.0])
effects = st.builds(
    Effect,
    cost=costs,
    divergence=st.none() | st.sampled_from([0.0, 0.01, 0.3]),
    spread=st.sampled_from([0.0, 0.1, 1.0]),
    start=st.sampled_from(["warm", "fresh"]),
    converged=st.booleans(),
)
own_bits = st.sampled_from([1.0, BITS["ternary"], 2.0, 4.0, 32.0])


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Runs of any quality: faults of every size, some references diverged, text own or foreign."""
    num_layers = draw(st.integers(1, 4))
    kinds = [make(n, p) for n in range(1, num_layers + 1) for make in (identity, direct) for p in PARTS]
    kinds += [direct(n, None, "int4") for n in range(1, num_layers + 1)]
    kinds += [challenge(n) for n in range(1, num_layers + 1)]
    kinds += [rescale(n, p) for n in range(1, num_layers + 1) for p in PARTS]
    kinds += [rollback(n, step) for n in range(1, num_layers + 1) for step in (200, 400)]
    kinds += [
        make(*pair) for n in range(1, num_layers) for make, pair in ((span, (n, n + 1)), (exchange, (n,)))
    ]
    kinds += [identity(1, target=num_layers)] if num_layers > 1 else []
    drawn = draw(st.lists(effects, min_size=len(kinds), max_size=len(kinds)))
    chosen = {r: e for r, e in zip(kinds, drawn, strict=True) if draw(st.integers(0, 9))}
    run = measure(
        chosen,
        num_layers=num_layers,
        seed=draw(st.integers(0, 99)),
        n_eval=draw(st.sampled_from([4, 8, 24])),
        n_select=8,
        unigram_ce=draw(st.sampled_from([1.0, 4.86])),
        layer_bits=tuple(draw(st.lists(own_bits, min_size=num_layers, max_size=num_layers))),
    )
    if draw(st.booleans()):
        diverged = draw(st.sets(st.integers(0, max(0, len(run.scores) - 1)), max_size=4))
        nan = (math.nan,) * len(run.nll_eval)
        scores = tuple(replace(s, nll_eval=nan) if i in diverged else s for i, s in enumerate(run.scores))
        run = replace(run, scores=scores)
    return foreign(run) if draw(st.booleans()) else run


@settings(max_examples=80, deadline=None)
@given(runs(), st.sets(st.sampled_from(VERDICTS)))
def test_no_verdict_says_more_than_was_measured(run, fail_on):
    result = judge(run, Policy(fail_on=tuple(fail_on)))
    assert tuple(v.layer for v in result.layers) == run.layers
    assert result.flagged == tuple(v.layer for v in result.layers if v.verdict in fail_on)
    untrained = "untrained" in result.network.flags
    for verdict in result.layers:
        bits = run.layer_bits[verdict.layer - 1]
        reference = verdict.reference
        assert verdict.verdict in VERDICTS
        assert verdict.reason
        assert bool(verdict.advice) == (verdict.verdict != "effective")
        assert (verdict.sublayer is not None) == (verdict.verdict in ("surpassed", "matched"))
        assert verdict.score is None or abs(verdict.score) <= 100
        if reference is not None:
            assert verdict.gap == pytest.approx(result.gap_of(reference))
            assert reference.layer <= verdict.layer <= reference.target
        if verdict.verdict == "surpassed":
            assert verdict.gap_interval[0] > 0
            assert reference.scheme in (None, run.scheme)
            has_its_bits = reference.kind in ("challenge", "rescale", "exchange", "rollback")
            assert has_its_bits or reference.bits <= bits + 1e-9
            assert not (reference.kind in ("challenge", "rescale") and result.network.data_fit == "foreign")
        elif reference is not None:
            assert reference.kind not in ("rollback", "rescale")
        if verdict.verdict == "matched" and not untrained:
            fit = next(s.fit for s in run.scores if s.reference == reference)
            assert reference.scheme in (None, run.scheme)
            assert reference.bits < bits - 1e-9 or fit.start == "fresh"
        if verdict.verdict == "effective" and result.network.data_fit == "own":
            assert verdict.gap_interval[1] < 0


FAULTY = changed(sound(), {identity(2, "attention"): -0.06, direct(2, "attention"): -0.05}, divergence=0.2)
MIXED = changed(changed(FAULTY, idle(4), spread=0.1), {identity(5): 0.1}, spread=5.0)


def essence(run: Run):
    """The verdicts and their figures, rounded to where the order of a sum cannot matter."""
    result = judge(run)
    figures = [
        (v.layer, v.verdict, v.sublayer, v.reference, v.effective_bits, v.own_bits)
        + tuple(round(x, 9) for x in (v.score, v.gap, *v.gap_interval, v.drop_cost))
        for v in result.layers
    ]
    return figures, result.flagged, result.network.flags, result.network.data_fit


@pytest.mark.parametrize("seed", range(3))
def test_the_same_run_gives_the_same_result(seed):
    run = measure(MIXED, seed=seed)
    assert judge(run) == judge(measure(MIXED, seed=seed))
    assert len({v.verdict for v in judge(run).layers}) > 2


def reordered(run: Run, select: np.ndarray, evaluation: np.ndarray) -> Run:
    def put(values, order):
        return tuple(np.asarray(values)[order])

    scores = tuple(
        replace(
            s,
            nll_select=put(s.nll_select, select),
            nll_eval=put(s.nll_eval, evaluation),
            kl_eval=put(s.kl_eval, evaluation),
        )
        for s in run.scores
    )
    return replace(
        run,
        nll_select=put(run.nll_select, select),
        nll_eval=put(run.nll_eval, evaluation),
        entropy_eval=put(run.entropy_eval, evaluation),
        scores=scores,
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 5), st.permutations(range(32)), st.permutations(range(64)), st.booleans())
def test_the_order_of_sequences_and_of_references_changes_nothing(seed, select, evaluation, abroad):
    run = measure(MIXED, seed=seed)
    run = foreign(run) if abroad else run
    mixed = reordered(run, np.array(select), np.array(evaluation))
    assert essence(mixed) == essence(run)
    assert essence(replace(run, scores=run.scores[::-1])) == essence(run)


def test_pairing_broken_between_network_and_reference_changes_the_result():
    """The counterpart: the order within one run is free, the pairing is not."""
    run = measure(MIXED, seed=1)
    backwards = replace(run, nll_eval=run.nll_eval[::-1])
    assert essence(backwards) != essence(run)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 5), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 5.0]))
def test_how_hard_a_sequence_is_changes_nothing(seed, draw, scale):
    """A constant added to every loss of a sequence, the network's own among them, cancels in every difference."""
    rng = np.random.default_rng(draw)
    run = measure(MIXED, seed=seed)
    select, evaluation = scale * rng.random(32), scale * rng.random(64)
    scores = tuple(
        replace(s, nll_select=tuple(s.nll_select + select), nll_eval=tuple(s.nll_eval + evaluation))
        for s in run.scores
    )
    harder = replace(
        run,
        nll_select=tuple(run.nll_select + select),
        nll_eval=tuple(run.nll_eval + evaluation),
        entropy_eval=tuple(run.entropy_eval + evaluation),
        unigram_ce=run.unigram_ce + float(evaluation.mean()),
        scores=scores,
    )
    assert essence(harder) == essence(run)


def test_peers_are_of_the_same_kind_at_other_layers():
    """Costs of one kind, at every layer, scaled together leave the verdicts of the other kinds where they were."""
    run = measure(changed(sound(), idle(3), spread=0.1))
    dearer = measure(
        {
            r: replace(e, cost=3 * e.cost) if r.kind == "direct" else e
            for r, e in changed(sound(), idle(3), spread=0.1).items()
        }
    )
    assert judge(run).flagged == judge(dearer).flagged == (3,)
