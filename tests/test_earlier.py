"""Blocks of earlier checkpoints: measured, kept, replayed and grafted as they are, and none that cannot stand in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import build_model, driven

from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.weights import BlockWeights
from peelcli.config import ExtractConfig, FitConfig
from peelcli.errors import CheckpointError
from peelcli.records import Run
from peelcli.references.interface import Replacement
from peelcli.scoring.replay import mean_nll
from peelcli.stages.audit import run_audit
from peelcli.stages.extract import run_extract
from peelcli.stages.fit import run_fit
from peelcli.stages.fitter import FitTask, Fitter
from peelcli.stages.graft import graft
from peelcli.stages.inspection import Inspection, open_and_scan
from peelcli.stages.keys import fit_key
from peelcli.stages.verify import run_verify
from peelcli.stages.workspace import Workspace
from peelcli.storage.activations import ActivationFile
from peelcli.storage.fit_reader import read_fit
from peelcli.storage.fit_writer import read_eval_ids

SEQ_LEN = 16
FIT = FitConfig(references=("rollback",), ladder=False, paths=("none",), threads=1)
WITH_IDENTITY = replace(FIT, references=("identity", "rollback"))


def moved(model: torch.nn.Module, seed: int) -> None:
    """A few steps of a run: every block moves a little."""
    torch.manual_seed(seed)
    for layer in blocks(model):
        for parameter in layer.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)


def blocks(model: Any) -> Sequence[torch.nn.Module]:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


class Series:
    """Three checkpoints of one run; the last holds layer 2 of the first, byte for byte."""

    def __init__(self, base: Path, family: str = "llama") -> None:
        model = build_model(family, initializer_range=0.05)
        self.base, self.paths = base, [base / f"checkpoint-{step}" for step in (100, 200, 300)]
        stale = {k: v.clone() for k, v in blocks(model)[1].state_dict().items()}
        for seed, path in enumerate(self.paths):
            if path == self.paths[-1]:
                blocks(model)[1].load_state_dict(stale)
            model.save_pretrained(path)
            moved(model, seed)
        ids = np.random.default_rng(0).integers(3, 97, (48, SEQ_LEN))
        np.save(base / "ids.npy", ids)
        self.extract = ExtractConfig(
            data=(base / "ids.npy",),
            fit_tokens=8 * SEQ_LEN,
            select_tokens=8 * SEQ_LEN,
            eval_tokens=16 * SEQ_LEN,
            seq_len=SEQ_LEN,
            threads=1,
        )

    @property
    def newest(self) -> Path:
        return self.paths[-1]

    def workspace(self, path: Path | None = None) -> Workspace:
        return Workspace.under(self.base / "work", path or self.newest)

    def opened(self) -> Inspection:
        return driven(open_and_scan(self.newest, self.workspace()))

    def activations(self) -> Path:
        return driven(run_extract(self.opened(), self.extract, self.workspace()))

    def fit(self, earlier: Sequence[Path], settings: FitConfig = FIT) -> Path:
        return driven(run_fit(self.opened(), self.activations(), settings, self.workspace(), None, earlier))

    def model(self, directory: Path | None = None) -> BlockwiseModel:
        return BlockwiseModel(
            directory or self.newest, dtype=torch.float32, device="cpu", offload_dir=self.base / "off"
        )


def loss_of(model: Any, ids: torch.Tensor) -> np.ndarray:
    """Mean next-token loss of each sequence, as transformers itself has it."""
    with torch.no_grad():
        log_p = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0].double().mean(1).numpy()


def loaded(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_loss_is_that_of_the_checkpoint_with_the_block_exchanged(family: str, tmp_path: Path) -> None:
    series = Series(tmp_path, family)
    path = series.fit(series.paths[:2])
    run, ids = read_fit(path), read_eval_ids(path)
    # Layer 2 is that of step 100: it is the layer itself, and no reference.
    assert {(s.reference.layer, s.reference.origin_step) for s in run.scores} == {
        (1, 100), (1, 200), (2, 200), (3, 100), (3, 200),
    }  # fmt: skip
    trained = loss_of(loaded(series.newest), ids)
    for score in run.scores:
        exchanged, older = (
            loaded(series.newest),
            loaded(tmp_path / f"checkpoint-{score.reference.origin_step}"),
        )
        layer = score.reference.layer
        blocks(exchanged)[layer - 1].load_state_dict(blocks(older)[layer - 1].state_dict())
        expected = loss_of(exchanged, ids)
        np.testing.assert_allclose(score.nll_eval, expected, atol=2e-5)
        assert np.abs(expected - trained).max() > 1e-3  # and that it is not the trained network's
        assert score.fit.start == "earlier"
        assert score.reference.bits == run.layer_bits[layer - 1]


def test_witnesses_replay_and_a_graft_puts_the_older_block_in(tmp_path: Path) -> None:
    series = Series(tmp_path)
    path = series.fit(series.paths[:2])
    run, model = read_fit(path), series.model()
    gaps = [(s, float(np.mean(run.nll_eval) - np.mean(s.nll_eval))) for s in run.scores]
    assert all(r.holds for r in driven(run_verify(path, model, gaps, (), 8)))
    (reference,) = [s.reference for s in run.scores if s.reference.key.startswith("rollback-002")]
    graft(path, open_checkpoint(series.newest), model, reference, tmp_path / "new")
    grafted, older, newest = (loaded(p) for p in (tmp_path / "new", series.paths[1], series.newest))
    for index in range(3):
        source = older if index == 1 else newest
        for name, value in blocks(grafted)[index].state_dict().items():
            assert torch.equal(value, blocks(source)[index].state_dict()[name]), (index, name)
    ids = read_eval_ids(path)
    assert mean_nll(series.model(tmp_path / "new"), ids, 8, None, Replacement()) == pytest.approx(
        np.mean(next(s.nll_eval for s in run.scores if s.reference == reference)), abs=2e-5
    )


def test_interrupted_anywhere_it_ends_the_same(tmp_path: Path) -> None:
    series = Series(tmp_path)
    whole = read_fit(series.fit(series.paths[:2], WITH_IDENTITY))
    fits = tmp_path / "fits"
    opened, acts = series.opened(), series.activations()

    def steps(output: Path) -> Generator[Any, None, Path]:
        return run_fit(opened, acts, WITH_IDENTITY, series.workspace(), output, series.paths[:2])

    names = [f"{e.stage} {e.done}" for e in steps(fits / "count.h5")]
    assert {"rollback 0", "rollback 4"} < set(names)
    rolling = [i for i, name in enumerate(names, start=1) if name.startswith("rollback")]
    for stop_at in (*rolling, len(names) - 2):
        output = fits / f"stopped-{stop_at}.h5"
        events = steps(output)
        for _ in range(stop_at):
            next(events)
        events.close()
        kept = {p: p.stat().st_mtime_ns for p in fits.glob(f"stopped-{stop_at}.h5.parts/rollback-*.h5")}
        again = []
        for event in steps(output):
            again += [event] if event.stage == "rollback" else []
            assert all(p.stat().st_mtime_ns == t for p, t in kept.items() if p.exists())
        run = read_fit(output)
        assert max((e.total for e in again), default=0) == 5 - len(kept)
        assert [s.reference for s in run.scores] == [s.reference for s in whole.scores]
        assert [s.nll_eval for s in run.scores] == [s.nll_eval for s in whole.scores]


def test_of_the_earlier_checkpoints_one_is_open_at_a_time(tmp_path: Path) -> None:
    series = Series(tmp_path)
    acts = ActivationFile(series.activations())
    seen: list[weakref.ref[BlockWeights]] = []

    def spied(opening: Callable[..., BlockWeights]) -> Callable[..., BlockWeights]:
        def open_one(**arguments: Any) -> BlockWeights:
            assert [ref() for ref in seen] == [None] * len(seen)
            weights = opening(**arguments)
            seen.append(weakref.ref(weights))
            return weights

        return open_one

    from peelcli.stages.previous_checkpoints import earlier_of, open_earlier

    others = driven(open_earlier(series.opened(), series.paths[:2], FIT, series.workspace()))
    earlier = [earlier_of(other, series.workspace()) for other in others]
    task = FitTask(
        tmp_path / "fit.h5", FIT, {}, earlier=tuple(replace(e, open=spied(e.open)) for e in earlier)
    )
    for _ in Fitter(series.model(), acts, task).run():
        pass
    acts.close()
    assert len(seen) == 2
    assert seen[-1]() is None


def test_without_earlier_checkpoints_the_kind_changes_nothing(tmp_path: Path) -> None:
    series = Series(tmp_path)
    identity = series.fit((), replace(FIT, references=("identity",)))
    assert series.fit((), WITH_IDENTITY) == identity
    assert {s.reference.kind for s in read_fit(identity).scores} == {"identity"}
    # Nor do earlier checkpoints where the kind is not asked for, or those that are the checkpoint itself.
    assert series.fit(series.paths[:2], replace(FIT, references=("identity",))) == identity
    assert series.fit([series.newest], WITH_IDENTITY) == identity
    assert series.fit(series.paths[:2], WITH_IDENTITY) != identity


def test_the_key_says_which_earlier_checkpoints_there_were() -> None:
    keys = [fit_key("acts", WITH_IDENTITY, ids) for ids in ((), ("a",), ("b",), ("a", "b"))]
    assert len(set(keys)) == 4
    assert fit_key("acts", replace(FIT, references=("identity",))) == keys[0]


def test_the_scan_of_a_series_is_kept_for_its_later_audits(tmp_path: Path) -> None:
    series = Series(tmp_path)
    driven(open_and_scan(series.paths[0], series.workspace(series.paths[0])))
    acts = series.activations()
    stages = [
        (e.stage, e.detail)
        for e in run_fit(series.opened(), acts, FIT, series.workspace(), None, series.paths[:2])
    ]
    scanned = [detail for stage, detail in stages if stage == "scan"]
    num_tensors = len(open_checkpoint(series.paths[1]).tensors)
    assert len(scanned) == num_tensors  # of the second alone
    assert len(list((tmp_path / "work").iterdir())) == 3


# -- checkpoints that cannot stand in ----------------------------------------------------------------------------------

OTHERS = {
    "deeper": ({"num_hidden_layers": 4}, "has 4 layers"),
    "wider": ({"intermediate_size": 40}, "is [32, 40]"),
    "biased": ({"attention_bias": True}, "'self_attn.k_proj.bias' of layer 1"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_an_error_by_hand_and_left_out_of_an_audit(name: str, tmp_path: Path) -> None:
    overrides, words = OTHERS[name]
    series, other = Series(tmp_path), tmp_path / name
    build_model("llama", **overrides).save_pretrained(other)
    with pytest.raises(CheckpointError) as error:
        series.fit([other])
    for part in (str(other), str(series.newest), words, "--references"):
        assert part in str(error.value)
    run = audited(series, [other, series.paths[0]])
    assert {s.reference.origin_step for s in run.scores if s.reference.kind == "rollback"} == {100}
    (note,) = [line for line in run.skipped if "rollback" in line]
    assert str(other) in note
    assert words in note
    assert [n for n in audited(series, [series.paths[0]]).skipped if "rollback" in n] == []


def audited(series: Series, earlier: Sequence[Path]) -> Run:
    steps = run_audit(series.newest, series.extract, WITH_IDENTITY, series.workspace(), earlier)
    return driven(steps).run


def test_blocks_that_are_not_finite_stand_in_for_none(tmp_path: Path) -> None:
    series = Series(tmp_path)
    model = loaded(series.paths[0])
    blocks(model)[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(series.paths[0])
    run = read_fit(series.fit(series.paths[:2]))
    assert {(s.reference.layer, s.reference.origin_step) for s in run.scores} == {
        (1, 200), (2, 200), (3, 100), (3, 200),
    }  # fmt: skip
    assert all(np.isfinite(s.nll_eval).all() for s in run.scores)
