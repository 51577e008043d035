"""A network that is worse than token frequencies and better without its blocks: one layer is blamed, or none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulated import CE, Effect, challenge, changed, direct, identity, measure, sizes, sound

from peelcli.records import AuditResult, Reference, Run
from peelcli.verdict import Policy, judge

FREQUENCIES = CE - 0.8  # the wrecked network does that much worse than token frequencies
STACK = Reference("identity", 1, 5)


def wrecked(
    gains: dict[int, float], seed: int = 0, factors: dict[int, float] | None = None, **costs: float
) -> Run:
    """As measured on small networks: dropped, the blocks behind the wreck do better, and so do any fitted to it."""
    effects = changed(sound(ladder=False), {STACK: costs.get("stack", -0.9)})
    effects = changed(effects, {identity(5): -0.6, identity(3): -0.2, direct(4): -0.1}, divergence=0.5)
    effects = changed(effects, {challenge(n): -gain for n, gain in gains.items()}, spread=0.5)
    return measure(effects, seed=seed, unigram_ce=FREQUENCIES, weight_rms=sizes(factors or {}))


GAINS = {1: 1.6, 2: 1.1, 3: 0.9, 4: 0.8, 5: 1.0}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_the_layer_whose_repair_mends_the_network_is_flagged_alone(seed, layer):
    gains = {**GAINS, 1: GAINS[layer], layer: GAINS[1]}
    result = judge(wrecked(gains, seed))
    assert result.network.flags == ("damaged",)
    assert result.network_flagged
    assert result.flagged == (layer,)
    verdict = result.layers[layer - 1]
    assert (verdict.verdict, verdict.reference) == ("surpassed", challenge(layer))
    assert verdict.score > 1 > max(v.score for v in result.layers if v.layer != layer)
    others = [v for v in result.layers if v.layer != layer]
    assert {v.verdict for v in others} == {"undecided"}
    assert all(f"layer {layer}" in v.reason and f"layer {layer}" in v.advice for v in others)


def test_where_no_repair_brings_the_loss_below_token_frequencies_no_layer_is_blamed():
    """As on text that makes no sense to a sound network: it can adapt to some of it, and no layer is at fault."""
    result = judge(wrecked({n: gain / 3 for n, gain in GAINS.items()}))
    assert result.flagged == ()
    assert result.network.flags == ("damaged",)
    assert {v.verdict for v in result.layers} == {"undecided"}


LIKE = {1: 0.5, 2: 0.95, 3: 0.9, 4: 0.85, 5: 0.92}


def test_where_no_repair_leads_clearly_no_layer_is_blamed_for_it():
    """As measured where the first layer holds new weights: the second is mended as well as the rest."""
    assert judge(wrecked({n: 2 * gain for n, gain in LIKE.items()})).flagged == ()


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_then_a_layer_whose_weights_alone_are_of_another_size_is(factor):
    gains = {n: 2 * gain for n, gain in LIKE.items()}
    result = judge(wrecked(gains, factors={1: factor, 3: 1.2}))
    assert result.flagged == (1,)
    assert result.layers[0].reference == challenge(1)
    assert result.layers[0].score >= 1 > max(v.score for v in result.layers[1:])
    assert judge(wrecked(gains, factors={1: factor, 3: factor})).flagged == ()
    assert judge(wrecked({**gains, 1: 0.0}, factors={1: factor})).flagged == ()


# What leaving out all blocks from layer k on adds to the loss: k = 1 is the whole stack.
WRECKED_FIRST = {1: -0.9, 2: -0.3, 3: -0.4, 4: -0.5, 5: -0.6}
WRECKED_THIRD = {1: -0.9, 2: -1.0, 3: -1.1, 4: -0.2, 5: -0.3}


@pytest.mark.parametrize(("until", "layer"), [(WRECKED_FIRST, 1), (WRECKED_THIRD, 3)])
def test_then_the_first_layer_behind_which_the_head_reads_worse_is(until, layer):
    gains = {n: 2 * gain for n, gain in {**LIKE, 1: 0.8}.items()}
    trained_on = changed(sound(ladder=False), {challenge(n): -g for n, g in gains.items()}, spread=0.5)
    read_early = trained_on | {
        Reference("identity", n, 5): Effect(cost, spread=0.5) for n, cost in until.items()
    }

    def judged(effects: dict[Reference, Effect], without: Reference | None = None) -> AuditResult:
        run = measure(effects, unigram_ce=FREQUENCIES, weight_rms=sizes({}))
        return judge(replace(run, scores=tuple(s for s in run.scores if s.reference != without)))

    result = judged(read_early)
    assert result.flagged == (layer,)
    assert any("reads the text worse" in note for note in result.layers[layer - 1].notes)
    assert result.layers[layer - 1].score >= 1 > max(v.score for v in result.layers if v.layer != layer)
    # Not where that depth was not read, nor where the layer's repair does not mend the network.
    assert judged(read_early, Reference("identity", 2, 5)).flagged == ()
    assert judged(changed(read_early, {challenge(layer): -0.5}, spread=0.5)).flagged == ()


def test_without_challenges_no_layer_is_blamed():
    run = wrecked(GAINS)
    kept = tuple(s for s in run.scores if s.reference.kind != "challenge")
    result = judge(replace(run, scores=kept))
    assert (result.flagged, result.network_flagged) == ((), True)


@pytest.mark.parametrize("stack", [-0.01, 0.0, 0.6, 19.0])
def test_a_network_that_needs_its_blocks_is_not_damaged(stack):
    """Small models on foreign text lose .6 and 1.4 nats without their blocks, a real one 19."""
    assert "damaged" not in judge(wrecked(GAINS, stack=stack)).network.flags


def test_nor_is_one_that_beats_token_frequencies():
    run = replace(wrecked(GAINS), unigram_ce=CE + 1.0)
    assert "damaged" not in judge(run).network.flags


def test_the_policy_says_whether_a_damaged_network_is_flagged():
    assert not judge(wrecked(GAINS), Policy(fail_on=("surpassed",))).network_flagged
    assert judge(wrecked(GAINS), Policy(fail_on=("surpassed",))).flagged == (1,)


def test_a_random_network_stays_untrained():
    effects = {r: Effect(0.004, divergence=0.02, start=e.start) for r, e in sound(ladder=False).items()}
    run = measure(effects, noise=0.02, unigram_ce=FREQUENCIES)
    assert judge(run).network.flags == ("untrained",)
