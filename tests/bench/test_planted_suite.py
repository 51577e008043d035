"""A slice of the planted-fault suite: plants hurt what they name and nothing else, the truth is told, figures count."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import opened
from decoders import Recipe, blocks_of, build, part_of
from hypothesis import given
from hypothesis import strategies as st
from planted import detect, truth
from planted.cases import BASES, SPLITS, Base, Case, cases_of
from planted.figures import auroc, report, rows_of
from planted.plant import AFTER, checkpoint_of, held_out_ids, held_out_text, twin_of
from planted.truth import dropped, truths_of

from peelcli.checkpoint.files import open_checkpoint
from peelcli.stages.precision import precision_of

TINY = Recipe(
    num_layers=3,
    d_model=32,
    num_heads=4,
    seq_len=32,
    batch_size=8,
    steps=120,
    saved_steps=(12, 36, 120),
    train_tokens=20_000,
    tokenizer=300,
)
PLANTS = [
    Case("tiny", kind, (2, 3) if kind == "exchanged" else (2,), part, severity)
    for kind, part, severity in (
        ("new weights", "block", 0.0),
        ("new weights", "mlp", 0.0),
        ("older", "block", 0.1),
        ("other seed", "attention", 0.0),
        ("exchanged", "block", 0.0),
        ("noise", "attention", 0.3),
        ("rotary lost", "attention", 0.0),
        ("heads shuffled", "attention", 0.0),
        ("scales off", "block", 2.0),
        ("fewer bits", "block", 1.0),
    )
]


@pytest.fixture(scope="module")
def cache(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not (shared / TINY.corpus).exists():
        pytest.skip(f"needs ../shared/data/{TINY.corpus}")
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setitem(BASES, "tiny", Base("tiny", "tune", TINY, TINY.corpus))
        bitnet = replace(TINY, family="bitnet", precision="bitnet")
        patch.setitem(BASES, "tiny-bitnet", Base("tiny-bitnet", "tune", bitnet, TINY.corpus))
        patch.setattr(detect, "settings_of", quick_settings)
        patch.setattr(truth, "RECOVERY_STEPS", 10)
        transformers.utils.logging.disable_progress_bar()
        yield tmp_path_factory.mktemp("planted")


def quick_settings(text: Path) -> tuple[object, object]:
    from peelcli.config import ExtractConfig, FitConfig

    budget = {"fit_tokens": 1024, "select_tokens": 1024, "eval_tokens": 3072}
    extract = ExtractConfig(data=(text,), seq_len=32, threads=1, **budget)
    return extract, FitConfig(references=("identity",), ladder=False, paths=("none",), threads=1)


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return {name: value.detach() for name, value in model.named_parameters()}


def test_every_fault_that_is_planted_afterwards_is_tried() -> None:
    assert {case.kind for case in PLANTS} == set(AFTER)


@pytest.mark.parametrize(
    "case", [*PLANTS, *(replace(case, base="tiny-bitnet") for case in PLANTS)], ids=lambda case: case.name
)
def test_a_plant_hurts_what_it_names_and_nothing_else(case: Case, shared: Path, cache: Path) -> None:
    hurt, twin = (weights_of(find(case, shared, cache)) for find in (checkpoint_of, twin_of))
    changed = {name for name in twin if not torch.equal(hurt[name], twin[name])}
    model = transformers.AutoModelForCausalLM.from_pretrained(twin_of(case, shared, cache))
    owners = [part for layer in case.layers for part in part_of(blocks_of(model)[layer - 1], case.part)]
    allowed = {
        name for name, p in model.named_parameters() if any(p is q for m in owners for q in m.parameters())
    }
    assert changed
    assert changed <= allowed


def test_what_is_planted_in_latent_weights_runs_in_their_class(shared: Path, cache: Path) -> None:
    """Noise leaves the grid of a ternary network, and is rounded to it in BitNet's."""
    home = checkpoint_of(Case("tiny-bitnet", "noise", (2,), "attention", 0.3), shared, cache)
    model = opened(home, cache / "work")
    matrices = [weight for weight in model.read_weights(2).values() if weight.ndim == 2]
    assert [len(weight.unique()) for weight in matrices] == [3] * 7
    assert precision_of(open_checkpoint(home)).running.activation is not None


def test_a_frozen_layer_keeps_its_initial_weights_and_the_others_learn(shared: Path, cache: Path) -> None:
    frozen = weights_of(checkpoint_of(Case("tiny", "stopped", (2,), "mlp", 0.0), shared, cache))
    twin = weights_of(checkpoint_of(Case("tiny", "healthy"), shared, cache))
    initial = dict(build(TINY, 300).named_parameters())
    still = {name for name in frozen if torch.equal(frozen[name], initial[name])}
    assert still == {name for name in frozen if "layers.1.mlp" in name or "layers.1.post_attention" in name}
    assert not any(torch.equal(twin[name], initial[name]) for name in still if "norm" not in name)


def test_dropped_a_part_adds_nothing_and_comes_back(shared: Path, cache: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(twin_of(PLANTS[0], shared, cache))
    ids = held_out_ids(TINY, shared, cache, 320)
    before = model(ids, output_hidden_states=True).hidden_states
    with dropped(model, 2, "block"):
        inside = model(ids, output_hidden_states=True).hidden_states
        assert torch.equal(inside[2], inside[1])
    assert torch.equal(model(ids, output_hidden_states=True).hidden_states[2], before[2])


def test_held_out_text_is_neither_trained_on_nor_shared(shared: Path, cache: Path) -> None:
    audit = held_out_text(TINY, shared, cache).read_text(encoding="utf-8")
    corpus = (shared / TINY.corpus).read_text(encoding="utf-8")
    at = corpus.index(audit[:200])
    assert at > TINY.train_tokens
    assert audit[-200:] not in corpus[:at]


def test_the_whole_way_of_one_healthy_and_two_hurt(shared: Path, cache: Path) -> None:
    """The healthy twin is not flagged, an exchange is harm and a frozen sublayer is idle, and both are found."""
    healthy = Case("tiny", "healthy")
    hurt = [Case("tiny", "new weights", (2,)), Case("tiny", "stopped", (2,), "mlp", 0.0)]
    for case in (healthy, *hurt):
        record = {
            "truths": [asdict(t) for t in truths_of(case, shared, cache)],
            "peers": {},
            "fit": str(detect.audited(case, shared, cache)),
            "audit_seconds": 1.0,
        }
        (cache / "cases").mkdir(exist_ok=True)
        (cache / "cases" / f"{case.name}.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planted.figures.cases_of", lambda _: [healthy, *hurt])
        rows = rows_of([BASES["tiny"]], cache)
    assert rows[0].positives == set()
    assert rows[1].positives == {2}
    assert 2 not in rows[0].said.flagged
    assert 2 in rows[1].said.flagged


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8)
)
def test_auroc_is_the_chance_that_a_positive_is_above(positive: list[int], negative: list[int]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p, n in itertools.product(positive, negative)]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(positive, negative) == pytest.approx(1 - auroc(negative, positive))


def test_without_one_of_the_two_there_is_no_auroc() -> None:
    assert math.isnan(auroc([], [1.0]))


def test_the_splits_share_no_seed_and_cases_have_names_of_their_own() -> None:
    cases = [case for base in BASES.values() for case in cases_of(base)]
    assert len({case.name for case in cases}) == len(cases)
    seeds = {split: {b.recipe.seed for b in BASES.values() if b.split == split} for split in SPLITS}
    assert len(set().union(*seeds.values())) == sum(map(len, seeds.values()))


def test_a_report_of_nothing_measured_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing"):
        report(list(BASES.values()), tmp_path)
