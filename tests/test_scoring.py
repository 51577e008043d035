"""The sweep measures what a plain pass with the reference in place measures, for every kind and family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import build_model

from peelcli.calibration import Calibration, Split
from peelcli.checkpoint.files import open_checkpoint
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.scan import scan
from peelcli.config import FitConfig
from peelcli.quant.fake_quantize import fake_quantize
from peelcli.quant.initial_scale import initial_scale
from peelcli.quant.schemes import scheme_named
from peelcli.records import KINDS, WITHOUT_WEIGHTS, Reference, Run
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.interface import Replacement
from peelcli.scoring import sweep as scoring
from peelcli.scoring.replay import mean_nll
from peelcli.scoring.sweep import Candidate, Sweep
from peelcli.scoring.trained_pass import Extraction, extract, stored_states
from peelcli.stages.describe import describe
from peelcli.stages.fitter import FitTask, Fitter
from peelcli.stages.graft import graft
from peelcli.storage.activations import ActivationFile
from peelcli.storage.fit_reader import read_fit
from peelcli.storage.fit_writer import read_eval_ids
from peelcli.storage.parts import load_weights

SETTINGS = FitConfig(direct_steps=2, challenge_steps=2, path_steps=1, head_steps=2, ladder=False)


def calibration(vocab_size: int = 97, seq_len: int = 16, ids: np.ndarray | None = None) -> Calibration:
    """Random tokens, or `ids`: 8 sequences to fit, 8 to select, and the rest, 8 random ones, to evaluate."""
    if ids is None:
        ids = np.random.default_rng(0).integers(3, vocab_size, (24, seq_len))
    split = Split(ids[:8], ids[8:16], ids[16:])
    return Calibration(split, seq_len, "random tokens", "hash", vocab_size, False)


def extracted(
    directory: Path, work: Path, store_dtype: str = "float32", ids: np.ndarray | None = None
) -> tuple[BlockwiseModel, Path]:
    model = BlockwiseModel(directory, dtype=torch.float32, device="cpu", offload_dir=work / "off")
    layers = tuple(range(1, model.num_layers + 1))
    tokens = calibration(ids=ids)
    about = describe(
        directory,
        model,
        tokens,
        scan=scan(open_checkpoint(directory)),
        layers=layers,
        stored_bits=32.0,
        seed=0,
    )
    task = Extraction(work / "acts.h5", about, {}, stored_states(model.num_layers, layers), store_dtype, 3)
    for _ in extract(model, tokens, task):
        pass
    return model, work / "acts.h5"


def fitted(model: BlockwiseModel, acts: ActivationFile, output: Path, settings: FitConfig = SETTINGS) -> Run:
    for _ in Fitter(model, acts, FitTask(output, settings, {})).run():
        pass
    return read_fit(output)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "bloom", "mixtral"])
def test_sweep_equals_a_plain_pass(family: str, save_model: Callable[..., Path], tmp_path: Path) -> None:
    # Small weights: a random model that is sure of itself finds random tokens foreign, which rules challenges out.
    model, path = extracted(save_model(family, initializer_range=0.05), tmp_path)
    acts = ActivationFile(path)
    run = fitted(model, acts, tmp_path / "fit.h5")
    ids = read_eval_ids(tmp_path / "fit.h5")
    assert np.mean(run.nll_eval) == pytest.approx(mean_nll(model, ids, 4, None, Replacement()), abs=1e-5)
    kinds = set()
    for score in run.scores:
        r = score.reference
        replacement = Replacement() if r.kind in WITHOUT_WEIGHTS else load_weights(tmp_path / "fit.h5", r)
        if r.kind == "identity" and r.target > r.layer:
            continue  # all blocks at once: the sweep's own
        assert np.mean(score.nll_eval) == pytest.approx(mean_nll(model, ids, 4, r, replacement), abs=2e-5), (
            r.key
        )
        assert min(score.kl_eval) > -1e-6
        kinds.add((r.kind, r.sublayer))
    expected = {(kind, None) for kind in KINDS if kind != "rollback"}
    if family != "bloom":
        expected |= {(k, s) for k in ("identity", "direct", "rescale") for s in ("attention", "mlp")}
    assert kinds == expected
    acts.close()


@pytest.mark.parametrize("pair", [(1, 2), (2, 3), (1, 3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_exchange_measures_what_the_checkpoint_in_another_order_does(
    pair: tuple[int, int], threads: int, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model("llama", num_hidden_layers=3)
    model, path = extracted(directory, tmp_path)
    acts = ActivationFile(path)
    at_once = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        settings = FitConfig(references=("exchange",), ladder=False, paths=("none",))
        run = fitted(model, acts, tmp_path / "fit.h5", settings)
    finally:
        torch.set_num_threads(at_once)
    other = transformers.AutoModelForCausalLM.from_pretrained(directory)
    blocks = other.model.layers
    one, two = (n - 1 for n in pair)
    blocks[one], blocks[two] = blocks[two], blocks[one]
    ids = read_eval_ids(tmp_path / "fit.h5")
    with torch.no_grad():
        logits = other(input_ids=ids, use_cache=False).logits[:, :-1]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    (score,) = [s for s in run.scores if (s.reference.layer, s.reference.target) == pair]
    assert np.mean(score.nll_eval) == pytest.approx(float(plain), abs=1e-5)
    assert np.mean(score.nll_eval) != pytest.approx(np.mean(run.nll_eval), abs=1e-5)
    graft(tmp_path / "fit.h5", open_checkpoint(directory), model, score.reference, tmp_path / "grafted")
    grafted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grafted")
    for name, value in other.state_dict().items():
        assert torch.equal(grafted.state_dict()[name], value), name
    acts.close()


def test_all_blocks_dropped_is_embedding_and_head(save_model: Callable[..., Path], tmp_path: Path) -> None:
    model, path = extracted(save_model(), tmp_path)
    acts = ActivationFile(path)
    run = fitted(model, acts, tmp_path / "fit.h5", FitConfig(references=("identity",), ladder=False))
    (stack,) = [s for s in run.scores if s.reference.target == model.num_layers > s.reference.layer]
    ids = read_eval_ids(tmp_path / "fit.h5")
    with torch.no_grad():
        logits = model.logits(model.prepare(ids).hidden, ids)[:, :-1]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert np.mean(stack.nll_eval) == pytest.approx(float(plain), abs=1e-5)
    acts.close()


def test_the_number_of_threads_changes_nothing(save_model: Callable[..., Path], tmp_path: Path) -> None:
    """Fits, challenges, paths and the sweep itself: every figure is the same, bit for bit."""
    model, path = extracted(save_model(initializer_range=0.05), tmp_path)
    acts = ActivationFile(path)
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            runs.append(fitted(model, acts, tmp_path / f"{threads}.h5", replace(SETTINGS, paths=("last",))))
        finally:
            torch.set_num_threads(before)
    alone, shared = runs
    assert {s.reference.kind for s in alone.scores} == set(KINDS) - {"rollback"}
    for a, b in zip(alone.scores, shared.scores, strict=True):
        assert (a.reference, a.nll_eval, a.kl_eval) == (b.reference, b.nll_eval, b.kl_eval)
    assert alone.paths is not None
    assert shared.paths is not None
    assert [s.nll_eval for s in alone.paths.scores] == [s.nll_eval for s in shared.paths.scores]
    acts.close()


def test_some_sequences_have_the_losses_that_they_have_among_all(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, path = extracted(save_model(), tmp_path)
    acts = ActivationFile(path)
    dropped, other = (Reference("identity", 1, 1, part) for part in (None, "mlp"))
    found = []
    for strides in ((1, 1), (3, 2)):
        candidates = [Candidate(r, None, s) for r, s in zip((dropped, other), strides, strict=True)]
        sweep = Sweep(model, acts, candidates, tmp_path / "scratch", key="", batch_size=2)
        for _ in sweep.run():
            pass
        found.append(sweep.losses)
    whole, some = found
    for reference, stride in ((dropped, 3), (other, 2)):
        for all_of_it, part in ((whole.nll, some.nll), (whole.kl, some.kl)):
            np.testing.assert_allclose(
                part[reference.key], all_of_it[reference.key][8:][::stride], rtol=1e-5, atol=1e-6
            )
    acts.close()


def sampled(directory: Path, count: int, seq_len: int = 16) -> np.ndarray:
    """Tokens that a model draws itself, so that whatever changes it costs it something."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.randint(3, 97, (count, 1), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        while ids.shape[1] < seq_len:
            p = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
    return ids.numpy()


@pytest.mark.parametrize("room", [3, 1000])  # states of so many candidates fit: several groups, and one
def test_states_that_stay_on_the_device_have_the_losses_of_those_in_files(
    room: int, save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = extracted(save_model(), tmp_path)
    acts = ActivationFile(path)
    parts = [Reference("identity", n, n, part) for n in (1, 2, 3) for part in (None, "attention", "mlp")]
    references = [*parts, Reference("identity", 1, 3), Reference("identity", 2, 3)]
    candidates = [Candidate(r, None, 1 + n % 2) for n, r in enumerate(references)]
    found = []
    for free in (
        0,
        2 * room * Sweep(model, acts, candidates[:1], tmp_path, key="", batch_size=3).scratch_nbytes,
    ):
        monkeypatch.setattr(scoring, "free_memory", lambda _, free=free: free)
        sweep = Sweep(model, acts, candidates, tmp_path / "scratch", key="", batch_size=3)
        began = [event.detail for event in sweep.run()].count("loss")
        found.append(sweep.losses)
        assert not any((tmp_path / "scratch").iterdir())
    assert began == (2 if room > len(candidates) else 3)  # one event at the end, and one for each group
    for figures in ("nll", "kl"):
        files, device = (getattr(losses, figures) for losses in found)
        assert files.keys() == device.keys()
        assert all(np.array_equal(files[key], device[key]) for key in files)
    assert found[0].fvu_eval == found[1].fvu_eval
    acts.close()


@pytest.mark.parametrize(("n_eval", "stride"), [(16, 2), (33, 4)])
def test_what_a_part_settles_has_its_losses_of_that_part_and_all_else_of_every_token(
    n_eval: int, stride: int, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model(num_hidden_layers=4)
    model, path = extracted(directory, tmp_path, ids=sampled(directory, 16 + n_eval))
    acts = ActivationFile(path)
    settings = replace(SETTINGS, references=("identity", "direct", "exchange"), paths=("none",))
    some, whole = (
        fitted(model, acts, tmp_path / f"{screen}.h5", replace(settings, screen=screen))
        for screen in (True, False)
    )
    settled = set()
    for a, b in zip(some.scores, whole.scores, strict=True):
        assert a.reference == b.reference
        if len(a.nll_eval) < n_eval:
            settled.add(a.reference)
            assert not a.nll_select
        assert a.stride(n_eval) == (stride if a.reference in settled else 1)
        for mine, all_of_it in ((a.nll_eval, b.nll_eval), (a.kl_eval, b.kl_eval)):
            np.testing.assert_allclose(mine, all_of_it[:: a.stride(n_eval)], rtol=1e-5, atol=1e-6)
        assert a.beside(some.nll_eval) == some.nll_eval[:: a.stride(n_eval)]
    assert 0 < len(settled) < len(some.scores)
    assert Reference("identity", 1, 4) not in settled
    acts.close()


def test_interrupted_anywhere_it_ends_the_same(save_model: Callable[..., Path], tmp_path: Path) -> None:
    """Give up after each step in turn and go on with a new fitter: the file must not tell the difference."""
    directory = save_model()
    model, path = extracted(directory, tmp_path, ids=sampled(directory, 32))
    acts = ActivationFile(path)
    whole = fitted(model, acts, tmp_path / "whole.h5")
    steps = sum(1 for _ in Fitter(model, acts, FitTask(tmp_path / "count.h5", SETTINGS, {})).run())
    assert steps > 8
    for stop_at in range(1, steps, 2):
        output = tmp_path / f"stopped-{stop_at}.h5"
        events = Fitter(model, acts, FitTask(output, SETTINGS, {})).run()
        for _ in range(stop_at):
            next(events)
        events.close()
        again = fitted(model, acts, output)
        for a, b in zip(whole.scores, again.scores, strict=True):
            assert a.reference == b.reference
            assert a.nll_eval == b.nll_eval
            assert a.fit.fvu_eval == b.fit.fvu_eval
    assert not list(tmp_path.glob("*.parts"))
    acts.close()


def test_interrupted_extraction_ends_the_same(save_model: Callable[..., Path], tmp_path: Path) -> None:
    directory = save_model()
    _, path = extracted(directory, tmp_path)
    whole = ActivationFile(path)
    model = BlockwiseModel(directory, dtype=torch.float32, device="cpu", offload_dir=tmp_path / "off")
    task = Extraction(tmp_path / "again.h5", whole.about, {}, tuple(whole.stored), "float32", 3)
    for _ in range(3):  # each gets one layer further
        events = extract(model, calibration(), task)
        next(events)
        next(events)
        events.close()
        assert not task.output.exists()
    seen = [event.detail for event in extract(model, calibration(), task)]
    assert "embedding" not in seen  # it went on rather than began anew
    again = ActivationFile(task.output)
    for layer in whole.stored:
        assert torch.equal(whole.states(layer, slice(None)), again.states(layer, slice(None)))
    assert np.array_equal(whole.nll, again.nll)
    whole.close()
    again.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_are_stored_in_half_precision(
    dtype: str, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model()
    (tmp_path / "full").mkdir()
    (tmp_path / "half").mkdir()
    full = ActivationFile(extracted(directory, tmp_path / "full")[1])
    half = ActivationFile(extracted(directory, tmp_path / "half", dtype)[1])
    for layer in full.stored:
        exact, stored = full.states(layer, slice(None)), half.states(layer, slice(None))
        assert stored.dtype == getattr(torch, dtype)
        torch.testing.assert_close(stored, exact.to(stored.dtype), rtol=0, atol=0)
    assert np.array_equal(full.nll, half.nll)  # what is computed is not rounded, only what is stored
    full.close()
    half.close()


def test_weights_on_a_grid_are_recognised_and_fitted_from_fresh_ones(tmp_path: Path) -> None:
    plain = build_model("llama", hidden_size=64, head_dim=16, intermediate_size=96, initializer_range=0.05)
    scheme = scheme_named("ternary")
    for name, weight in plain.named_parameters():
        if "proj" in name:
            weight.data = fake_quantize(
                weight.data, initial_scale(weight.data, QuantSpec(scheme.name)), QuantSpec(scheme.name)
            )
    plain.save_pretrained(tmp_path / "ckpt")
    model, path = extracted(tmp_path / "ckpt", tmp_path)
    acts = ActivationFile(path)
    assert acts.about["layer_bits"] == pytest.approx([scheme.num_bits] * 3)
    run = fitted(model, acts, tmp_path / "fit.h5")
    starts = {s.reference.kind: s.fit.start for s in run.scores}
    assert starts["direct"] == "fresh"
    (challenge, *_) = [s.reference for s in run.scores if s.reference.kind == "challenge"]
    weights = load_weights(tmp_path / "fit.h5", challenge).weights(torch.empty(0))
    for row in weights["mlp.up_proj.weight"]:
        assert len(row.abs().unique()) <= 2  # a challenge stays in the layer's own precision
    lighter = fitted(model, acts, tmp_path / "binary.h5", replace(SETTINGS, scheme="binary"))
    assert {s.fit.start for s in lighter.scores if s.reference.kind == "direct"} == {"warm"}
    acts.close()
