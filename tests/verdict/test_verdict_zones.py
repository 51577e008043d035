"""The zone of the network: a path counts by what it has beyond the head control, on text that did not choose it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated import foreign, measure, sound

from peelcli.records import FitOutcome, Paths, PathScore, Run
from peelcli.report.sentences import network_notes
from peelcli.verdict import Policy, judge, with_running_minimum

LAST, DIRECT, MIXED = (5,) * 5, (1, 2, 3, 4, 5), (1, 3, 3, 5, 5)
FIT = FitOutcome("warm", 20, True, "done")


def peeled(
    run: Run, control: float, gaps: dict[tuple[int, ...], float], *, spread: float = 0.03, seed: int = 0
) -> Run:
    """`run` with a control and maps that gain so much (nats, > 0: better) over the trained network."""
    rng = np.random.default_rng(seed)

    def score(target_map: tuple[int, ...], gain: float) -> PathScore:
        parts = (
            tuple((np.asarray(nll) - gain + rng.normal(0, spread, len(nll))).tolist())
            for nll in (run.nll_select, run.nll_eval)
        )
        return PathScore(target_map, (FIT,), (0.1,) * len(target_map), *parts)

    scores = tuple(score(m, g) for m, g in gaps.items())
    return replace(run, paths=Paths(score((), control), scores, ("fp",) * 5))


def zone(control: float, gaps: dict[tuple[int, ...], float], **more) -> str | None:
    return judge(peeled(measure(sound()), control, gaps, **more)).network.zone


def test_without_paths_there_is_no_zone():
    network = judge(measure(sound())).network
    assert network.zone is None
    assert network.bounds is None


@pytest.mark.parametrize("control", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(5))
def test_the_three_zones(control, seed):
    assert zone(control, {LAST: -1.0, DIRECT: control, MIXED: -0.2}, seed=seed) == "green"
    assert zone(control, {LAST: -1.0, DIRECT: control, MIXED: control + 0.1}, seed=seed) == "yellow"
    assert zone(control, {LAST: control + 0.1, DIRECT: control, MIXED: -0.2}, seed=seed) == "red"


@pytest.mark.parametrize("seed", range(5))
def test_what_a_refitted_head_gains_is_no_gain_of_a_path(seed):
    """The raw bounds lie below the network's loss; so does the control, and the text explains it (mismatch .3)."""
    assert zone(0.25, {LAST: 0.2, DIRECT: 0.25, MIXED: 0.2}, seed=seed) == "green"


@pytest.mark.parametrize("seed", range(5))
def test_a_head_that_gains_more_than_the_text_explains_shows_a_network_unconverged(seed):
    maps = {LAST: 0.1, DIRECT: 0.15}
    own = replace(measure(sound()), entropy_eval=tuple(np.add(measure(sound()).nll_eval, 0.7)))
    for run, expected in ((own, True), (measure(sound()), False), (foreign(measure(sound())), False)):
        network = judge(peeled(run, 0.38 if expected else 0.2, maps, seed=seed)).network
        assert ("unconverged" in network.flags) is expected
        assert any("learning rate" in note for note in network_notes(network)) is expected
    assert judge(peeled(own, 0.38, maps, seed=seed)).network.zone == "yellow"
    assert judge(peeled(own, 0.38, maps, seed=seed)).network_flagged


def test_a_path_must_beat_the_trained_network_itself_too():
    assert zone(-0.3, {LAST: -0.1, DIRECT: -0.2}) == "green"  # a control that went wrong helps no path


def test_the_best_map_is_chosen_on_select_alone():
    run = peeled(measure(sound()), 0.0, {LAST: -1.0, DIRECT: 0.0, MIXED: -0.5})
    lucky = replace(run.paths.scores[2], nll_eval=tuple(np.asarray(run.nll_eval) - 1.0))
    run = replace(run, paths=replace(run.paths, scores=(*run.paths.scores[:2], lucky)))
    network = judge(run).network
    assert network.zone == "green"
    assert network.bounds.yes.target_map == DIRECT


def test_many_equal_maps_give_no_false_alarm():
    """64 maps that are the control but for noise: the best on `select` is no better on `eval`."""
    maps = {tuple(sorted(np.random.default_rng(i).integers(1, 6, 4))) + (5,): 0.02 for i in range(64)}
    alarms = sum(zone(0.02, maps, seed=seed) != "green" for seed in range(100))
    assert alarms <= 9


def test_foreign_text_asks_for_more():
    own = peeled(measure(sound()), 0.0, {LAST: -1.0, MIXED: 0.05})
    far = peeled(foreign(measure(sound())), 0.0, {LAST: -1.0, MIXED: 0.05})
    assert judge(own).network.zone == "yellow"
    assert judge(far).network.zone == "green"


def test_the_policy_says_which_zone_fails():
    red = peeled(measure(sound()), 0.0, {LAST: 0.2})
    yellow = peeled(measure(sound()), 0.0, {LAST: -1.0, MIXED: 0.2})
    for run, name in ((red, "red"), (yellow, "yellow")):
        assert judge(run, Policy(fail_on=(name,))).network_flagged
        assert not judge(run, Policy(fail_on=("surpassed",))).network_flagged
        assert any(name in note.lower() for note in network_notes(judge(run).network))


def test_losses_that_are_not_finite_settle_nothing():
    run = peeled(measure(sound()), 0.0, {LAST: 0.2})
    bad = replace(run.paths.scores[0], nll_eval=(float("nan"),) * len(run.nll_eval))
    assert judge(replace(run, paths=replace(run.paths, scores=(bad,)))).network.zone is None


def test_the_running_minimum_is_a_stair_of_yes_bounds():
    runs = [peeled(measure(sound()), 0.0, {LAST: g}, spread=0.0) for g in (-1.0, -0.5, -0.7)]
    unpeeled = measure(sound())
    found = with_running_minimum([judge(r) for r in (*runs, unpeeled)])
    bounds = [r.network.bounds for r in found]
    assert [round(b.running_minimum - b.yes.ce, 6) for b in bounds[:3]] == [0.0, 0.0, -0.2]
    assert bounds[3] is None


def test_networks_of_another_shape_share_no_minimum():
    one = judge(peeled(measure(sound()), 0.0, {LAST: 0.0}))
    other = replace(one, run=replace(one.run, num_layers=4))
    assert all(r.network.bounds.running_minimum is None for r in with_running_minimum([one, other]))
