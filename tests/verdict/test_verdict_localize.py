"""Where what decides speaks of a whole block, what else was measured tells which part of it to look at."""

from __future__ import annotations

import pytest
from simulated import (
    DROPPED,
    GAIN,
    challenge,
    changed,
    direct,
    identity,
    idle,
    measure,
    rescale,
    sizes,
    sound,
)

from peelcli.verdict import judge

HURT = changed(sound(), {challenge(3): -4 * GAIN})
UNUSED = changed(sound(), {direct(3): 0.0}, spread=0.05)


def verdict_of(effects, **fields):
    """Of layer 3, which must be the one that is flagged."""
    result = judge(measure(effects, **fields))
    assert result.flagged == (3,)
    return result.layers[2]


@pytest.mark.parametrize(
    ("attention", "mlp", "named"),
    [(0.03, 0.002, "attention"), (0.002, 0.03, "mlp"), (0.03, 0.02, "block"), (0.004, 0.0, "block")],
)
def test_of_a_layer_that_gains_by_training_the_part_that_gains_by_other_lengths(attention, mlp, named):
    gains = {rescale(3, "attention"): -attention, rescale(3, "mlp"): -mlp}
    verdict = verdict_of(changed(HURT, gains))
    assert (verdict.verdict, verdict.reference.kind, verdict.sublayer) == ("surpassed", "challenge", named)
    assert any("first: its matrices at other lengths" in note for note in verdict.notes) == (named != "block")


@pytest.mark.parametrize(
    ("attention", "mlp", "named"),
    [(0.05, 1.0, "attention"), (1.0, 0.05, "mlp"), (1.0, 1.0, "block"), (0.05, 0.2, "block")],
)
def test_of_a_layer_for_which_few_bits_do_the_part_that_can_be_dropped(attention, mlp, named):
    costs = {
        identity(3, "attention"): attention * DROPPED["attention"],
        identity(3, "mlp"): mlp * DROPPED["mlp"],
    }
    verdict = verdict_of(changed(UNUSED, costs, divergence=0.5))
    assert (verdict.verdict, verdict.reference.kind, verdict.sublayer) == ("matched", "direct", named)


@pytest.mark.parametrize(("factor", "named"), [(0.4, "mlp"), (1.0, "block"), (0.9, "block")])
def test_of_a_layer_that_can_be_dropped_as_a_whole_the_part_whose_weights_are_unlike_the_others(
    factor, named
):
    effects = changed(sound(), idle(3), spread=0.05)
    verdict = verdict_of(effects, weight_rms=sizes({3: factor}, part="mlp"))
    assert (verdict.verdict, verdict.sublayer) == ("matched", named)


@pytest.mark.parametrize(("block", "named"), [(-0.2, "block"), (-0.1, "attention")])
def test_a_block_that_does_no_better_dropped_than_its_attention_is_not_to_blame_as_a_whole(block, named):
    effects = changed(
        sound(), {identity(3, "attention"): -0.12, identity(3): block}, divergence=0.3, spread=0.2
    )
    assert verdict_of(effects).sublayer == named
