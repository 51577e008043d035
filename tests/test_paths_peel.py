"""Peeled paths: what they report is what a plain pass measures, and peeling stops, goes on and searches well."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import driven
from test_scoring import extracted

from peelcli.checkpoint.model import BlockwiseModel
from peelcli.config import FitConfig
from peelcli.errors import ArtefactError, UsageError
from peelcli.fitting.paths import PeelTask, WantedMaps, run_peeling, wanted_maps
from peelcli.fitting.target_maps import NAMED, count_fits, map_of_subset, named_map
from peelcli.quant.fake_quantize import fake_quantize
from peelcli.quant.grid import recognise_grid
from peelcli.quant.initial_scale import initial_scale
from peelcli.records import Paths
from peelcli.records.quant_spec import QuantSpec
from peelcli.scoring.replay import path_mean_nll
from peelcli.stages.fitter import FitTask, Fitter
from peelcli.storage.activations import ActivationFile
from peelcli.storage.fit_reader import read_fit
from peelcli.storage.fit_writer import read_eval_ids
from peelcli.storage.path_parts import load_path

FREE = QuantSpec("fp")


def task_for(parts: Path, num_layers: int = 3, *, start: str = "warm", key: str = "k") -> PeelTask:
    parts.mkdir(exist_ok=True)
    return PeelTask(parts, key, start, (FREE,) * num_layers, block_steps=1, head_steps=4, seed=0)


def peeled(model: BlockwiseModel, acts: ActivationFile, task: PeelTask, asked: WantedMaps) -> Paths:
    steps = run_peeling(model, acts, task, asked)
    return driven(steps)[0]


@pytest.fixture
def opened(
    save_model: Callable[..., Path], tmp_path: Path
) -> Iterator[Callable[..., tuple[BlockwiseModel, ActivationFile]]]:
    files = []

    def open_one(family: str = "llama", **overrides: object) -> tuple[BlockwiseModel, ActivationFile]:
        model, path = extracted(save_model(family, **overrides), tmp_path)
        files.append(ActivationFile(path))
        return model, files[-1]

    yield open_one
    for file in files:
        file.close()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "bloom", "mixtral"])
@pytest.mark.parametrize("start", ["warm", "fresh"])
def test_a_path_loses_what_a_plain_pass_with_its_witnesses_loses(family, start, opened, tmp_path):
    model, acts = opened(family)
    settings = FitConfig(references=("identity",), ladder=False, start=start, path_steps=1, head_steps=2)
    for _ in Fitter(model, acts, FitTask(tmp_path / "fit.h5", settings, {})).run():
        pass
    paths = read_fit(tmp_path / "fit.h5").paths
    ids = read_eval_ids(tmp_path / "fit.h5")
    assert [s.target_map for s in paths.scores] == [(1, 2, 3), (1, 3, 3), (3, 3, 3)]
    replayed = 0
    for score in (paths.control, *paths.scores):
        try:
            blocks, head = load_path(tmp_path / "fit.h5", score.target_map)
        except ArtefactError:
            continue  # the weights of maps that decide nothing are not kept
        replayed += 1
        plain = path_mean_nll(model, ids, 4, blocks, head)
        assert np.mean(score.nll_eval) == pytest.approx(plain, abs=2e-5), score.target_map
    best = min(paths.scores, key=lambda s: np.mean(s.nll_select)).target_map
    assert replayed == 1 + len({best, (3, 3, 3)})


def test_free_blocks_that_start_from_the_trained_ones_are_the_control_on_the_direct_map(opened, tmp_path):
    model, acts = opened()
    paths = peeled(model, acts, task_for(tmp_path / "p"), wanted_maps(("direct",), 3))
    assert max(paths.scores[0].unexplained) == 0
    assert paths.scores[0].nll_eval == paths.control.nll_eval
    assert len(paths.scores[0].fits) == 3 + 1


def test_the_control_is_never_worse_than_the_trained_network_on_select(opened, tmp_path):
    model, acts = opened()
    paths = peeled(model, acts, task_for(tmp_path / "p"), WantedMaps(()))
    assert np.mean(paths.control.nll_select) <= acts.nll[acts.rows["select"]].mean() + 1e-6


def test_blocks_of_a_low_bit_model_stay_in_its_scheme(opened, save_model, tmp_path):
    from transformers import AutoModelForCausalLM

    source = save_model("llama")
    low = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for name, p in low.model.layers.named_parameters():
            if p.ndim == 2:
                scale = initial_scale(p, QuantSpec("ternary"))
                p.copy_(fake_quantize(p, scale, QuantSpec("ternary"))), name  # noqa: B018
    low.save_pretrained(tmp_path / "low")
    model, path = extracted(tmp_path / "low", tmp_path)
    acts = ActivationFile(path)
    settings = FitConfig(references=("identity",), paths=("last",), ladder=False, path_steps=2, head_steps=2)
    for _ in Fitter(model, acts, FitTask(tmp_path / "fit.h5", settings, {})).run():
        pass
    acts.close()
    assert read_fit(tmp_path / "fit.h5").paths.schemes == ("ternary",) * 3
    blocks, _ = load_path(tmp_path / "fit.h5", (3, 3, 3))
    like = torch.empty(0)
    assert all(blocks)
    for block in blocks:
        for name, weight in block.weights(like).items():
            assert recognise_grid(weight).spec.scheme == "ternary", name


def test_interrupted_anywhere_it_ends_the_same_and_fits_nothing_twice(opened, tmp_path):
    model, acts = opened()
    asked = WantedMaps(wanted_maps(("all",), 3).maps, search=True)
    whole = peeled(model, acts, task_for(tmp_path / "whole"), asked)
    events = sum(1 for _ in run_peeling(model, acts, task_for(tmp_path / "count"), asked))
    for stop_at in range(2, events, 3):
        parts = tmp_path / f"stopped-{stop_at}"
        steps = run_peeling(model, acts, task_for(parts), asked)
        for _ in range(stop_at):
            next(steps)
        steps.close()
        before = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.h5")}
        again = peeled(model, acts, task_for(parts), asked)
        assert [(s.target_map, s.nll_eval) for s in again.scores] == [
            (s.target_map, s.nll_eval) for s in whole.scores
        ]
        assert again.num_fits == whole.num_fits
        assert {name: (parts / name).stat().st_mtime_ns for name in before} == before


def test_parts_of_other_work_are_not_used(opened, tmp_path):
    model, acts = opened()
    asked = wanted_maps(("last",), 3)
    peeled(model, acts, task_for(tmp_path / "p"), asked)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "p").glob("*.h5")}
    peeled(model, acts, task_for(tmp_path / "p", key="other"), asked)
    assert all((tmp_path / "p" / name).stat().st_mtime_ns > at for name, at in before.items())


def test_a_spent_budget_leaves_maps_out_and_says_which(opened, tmp_path):
    model, acts = opened()
    asked = wanted_maps(("last", "direct", "search"), 3, budget=0.0)
    paths = peeled(model, acts, task_for(tmp_path / "p"), asked)
    assert not paths.scores
    assert len(paths.control.nll_eval) == 8
    told = "\n".join(paths.left_out)
    assert "[3, 3, 3]" in told
    assert "[1, 2, 3]" in told
    assert "after 0 of 6 segments" in told


def test_a_search_peels_the_named_maps_and_the_most_promising_within_its_fits(opened, tmp_path):
    model, acts = opened(num_hidden_layers=6)
    paths = peeled(model, acts, task_for(tmp_path / "p", 6), wanted_maps(("search",), 6))
    maps = [s.target_map for s in paths.scores]
    named = [named_map(name, 6) for name in NAMED]
    assert set(named) < set(maps)
    assert len(set(maps)) == len(maps)
    bounds = {s.target_map: np.mean(s.nll_select) for s in paths.scores}
    assert min(bounds.values()) <= min(bounds[m] for m in named)
    assert paths.num_fits == 21 + count_fits(maps)  # 21 segments
    assert count_fits(maps) <= max(1.5 * 21, count_fits(named))
    assert any(f"{32 - len(maps)} of 32 maps" in line for line in paths.left_out)


def test_large_states_lie_in_files_and_change_nothing(opened, tmp_path, monkeypatch):
    model, acts = opened()
    asked = wanted_maps(("all",), 3)
    held = peeled(model, acts, task_for(tmp_path / "a"), asked)
    monkeypatch.setattr("peelcli.fitting.paths.block_fit.HELD_NBYTES", 0)
    assert not list((tmp_path / "b").glob("*.bin"))
    filed = peeled(model, acts, task_for(tmp_path / "b"), asked)
    assert list((tmp_path / "b").glob("*.bin"))
    assert [s.nll_eval for s in held.scores] == [s.nll_eval for s in filed.scores]


def test_without_the_states_of_every_layer_nothing_is_peeled_and_it_is_said(opened, tmp_path):
    model, acts = opened(num_hidden_layers=6)
    acts.stored = acts.stored[:-2] + acts.stored[-1:]
    settings = FitConfig(references=("identity",), ladder=False)
    for _ in Fitter(model, acts, FitTask(tmp_path / "fit.h5", settings, {})).run():
        pass
    run = read_fit(tmp_path / "fit.h5")
    assert run.paths is None
    assert any("peeled paths" in line and "--layers" in line for line in run.skipped)


def test_maps_are_asked_for_by_name_or_written_out():
    asked = wanted_maps(("last", "[1,3, 3]", "last"), 3, 60.0)
    assert asked == WantedMaps(((3, 3, 3), (1, 3, 3)), False, 60.0)
    assert wanted_maps(("none",), 3) == WantedMaps((), False, math.inf)
    assert wanted_maps(("search",), 4).maps == tuple(named_map(name, 4) for name in NAMED)
    assert len(wanted_maps(("all",), 4).maps) == 8


@pytest.mark.parametrize(
    ("names", "word"), [(("[1,2]",), "3 numbers"), (("[3,2,3]",), "aims"), (("[9,9,9]",), "9")]
)
def test_a_map_that_is_none_is_refused(names, word):
    with pytest.raises(UsageError, match=word):
        wanted_maps(names, 3)


def test_all_maps_of_many_layers_are_refused():
    with pytest.raises(UsageError, match="1 to 8"):
        wanted_maps(("all",), 9)


def test_a_search_of_twelve_layers_needs_a_twentieth_of_the_fits_of_all_maps(opened, tmp_path):
    model, acts = opened(num_hidden_layers=12)
    task = replace(task_for(tmp_path / "p", 12), block_steps=0, head_steps=1)
    paths = peeled(model, acts, task, wanted_maps(("search",), 12))
    every = [map_of_subset(s, 12) for k in range(12) for s in combinations(range(1, 12), k)]
    assert paths.num_fits <= count_fits(every) / 20
    bounds = {s.target_map: np.mean(s.nll_select) for s in paths.scores}
    named = [named_map(name, 12) for name in NAMED]
    assert min(bounds.values()) <= min(bounds[m] for m in named)
    assert len(bounds) > len(named)
