"""The one call: budgets, lengths, defaults, determinism, and errors that help."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peelcli.calibration import Calibration, build_calibration
from peelcli.errors import CalibrationError, UsageError

BUDGETS = {"fit": 640, "select": 320, "eval": 640}


def word_tokenizer(bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    words = {"<s>": 0, "<unk>": 1, **{f"w{i}": 2 + i for i in range(5000)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": bos} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **marks)


TOKENIZER = word_tokenizer()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """5000 different words in paragraphs of ten."""
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(" ".join(f"w{10 * i + j}" for j in range(10)) for i in range(500)))
    return path


def build(*paths: Path, tokenizer: object = TOKENIZER, **changes: object) -> Calibration:
    options = {"vocab_size": 5002, "max_positions": 512, "seq_len": 32, "tokens": BUDGETS, "seed": 0}
    return build_calibration(paths, tokenizer, **{**options, **changes})  # type: ignore[arg-type]


def distinct_ids(split: object) -> set[bytes]:
    return {row.tobytes() for row in split.sequences}  # type: ignore[attr-defined]


def test_budgets_are_met_and_described(text: Path) -> None:
    got = build(text)
    assert got.tokens == BUDGETS
    assert got.split.sequences.dtype == np.int64
    assert got.split.fit.shape == (20, 32)
    assert (got.seq_len, got.vocab_size, got.description) == (32, 5002, "words.txt")
    assert got.starts_with_bos
    assert got.notes == ()
    assert got.content_hash == got.split.content_hash
    assert len(distinct_ids(got.split)) == 50, "no sequence is in two parts"


def test_the_same_seed_gives_the_same_ids_and_another_does_not(text: Path) -> None:
    assert build(text).content_hash == build(text).content_hash != build(text, seed=1).content_hash
    # Where the whole text is used there is no choice of sequences, only of their parts.
    whole = [build(text, tokens=dict.fromkeys(BUDGETS, 16000), seed=seed).split for seed in (0, 1)]
    assert distinct_ids(whole[0]) == distinct_ids(whole[1])
    assert whole[0].content_hash != whole[1].content_hash


def test_the_parts_of_a_text_share_no_words(text: Path) -> None:
    split = build(text, tokens={"fit": 1600, "select": 800, "eval": 1600}).split
    words = [set(part[:, 1:].ravel().tolist()) for part in (split.fit, split.select, split.eval)]
    assert not words[0] & words[1]
    assert not words[0] & words[2]
    assert not words[1] & words[2]


def test_each_part_gets_at_least_eight_sequences(text: Path) -> None:
    assert build(text, tokens={"fit": 1, "select": 1, "eval": 1}).tokens == dict.fromkeys(BUDGETS, 8 * 32)


def test_without_paths_the_language_reference(tmp_path: Path) -> None:
    # Any tokenizer will do; this one knows the bytes only.
    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    got = build(tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend), vocab_size=256, seq_len=None)
    assert got.description == "the Python language reference (pydoc_data.topics)"
    assert got.seq_len == 256
    assert not got.starts_with_bos
    assert any("no BOS" in note for note in got.notes)


def test_a_short_text_shrinks_all_parts_and_says_so(text: Path) -> None:
    got = build(text, tokens={"fit": 16000, "select": 8000, "eval": 16000})
    fit, select, evaluation = got.tokens["fit"], got.tokens["select"], got.tokens["eval"]
    assert 2500 < fit + select + evaluation < 5000
    assert abs(fit - evaluation) <= 64
    assert abs(fit - 2 * select) <= 96
    assert any("too short for the tokens asked for (16000 + 8000 + 16000" in note for note in got.notes)


def test_a_shorter_text_gets_shorter_sequences_unless_a_length_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("\n\n".join(" ".join(f"w{10 * i + j}" for j in range(10)) for i in range(130)))
    got = build(path, seq_len=None)
    assert got.seq_len == 32
    assert min(got.tokens.values()) >= 8 * 32
    assert any("too short for sequences of 256 tokens, so they have 32" in note for note in got.notes)
    with pytest.raises(
        CalibrationError, match=r"short\.txt: .*24 different .* 256 .* 6144 .*about 1[23]\d\d"
    ):
        build(path, seq_len=256)


def test_a_text_below_the_minimum_says_how_much_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text("\n\n".join(" ".join(f"w{10 * i + j}" for j in range(10)) for i in range(30)))
    with pytest.raises(
        CalibrationError, match=r"24 different sequences of 32 tokens, that is 768 .* about [23]\d\d"
    ):
        build(path, seq_len=None)


def test_the_default_length_is_the_checkpoints_where_that_is_less(text: Path) -> None:
    assert build(text, seq_len=None, max_positions=40).seq_len == 40
    assert build(text, seq_len=None, max_positions=16).seq_len == 16
    assert build(text, seq_len=None, max_positions=None, tokens=dict.fromkeys(BUDGETS, 1)).seq_len == 128


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"seq_len": 7}, "at least 8 tokens, found 7"),
        ({"seq_len": 65, "max_positions": 64}, "at most 64, .* found 65"),
        ({"tokens": {"fit": 640, "select": 320}}, "fit, select, eval"),
        ({"tokens": {**BUDGETS, "eval": 0}}, "positive"),
    ],
)
def test_requests_that_cannot_be_are_usage_errors(text: Path, changes: dict[str, object], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        build(text, **changes)


def test_a_checkpoint_of_too_few_positions_is_refused(text: Path) -> None:
    with pytest.raises(CalibrationError, match="has 4 positions"):
        build(text, seq_len=None, max_positions=4)


@pytest.mark.parametrize("with_path", [True, False])
def test_without_a_tokenizer_the_options_that_help_are_named(text: Path, with_path: bool) -> None:
    with pytest.raises(CalibrationError, match=r"no tokenizer; .*tokenizer\.json.*\.npy.*--data FILE\.bin"):
        build(*[text] if with_path else [], tokenizer=None)


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(5000))
    got = build(path, tokenizer=None)
    assert got.tokens == BUDGETS
    assert not got.starts_with_bos
    assert any("mid-document" in note for note in got.notes)
    assert (np.diff(got.split.sequences, axis=1) == 1).all()


def test_token_rows_shorter_than_the_default_set_the_length(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(5000).reshape(250, 20))
    assert build(path, tokenizer=None, seq_len=None).seq_len == 20
    with pytest.raises(CalibrationError, match="in rows of at most 20"):
        build(path, tokenizer=None, seq_len=32)


def test_repeated_token_rows_never_land_in_two_parts(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 5000, (40, 16))
    path = tmp_path / "ids.npy"
    np.save(path, np.concatenate([rows, rows, rows]))
    got = build(path, tokenizer=None, seq_len=16)
    assert len(got.split.sequences) == 40 == len(distinct_ids(got.split))


def test_bos_is_known_from_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "ids.bin"
    documents = [np.concatenate([[0], np.arange(2 + 40 * i, 42 + 40 * i)]) for i in range(100)]
    np.concatenate(documents).astype("<u2").tofile(path)
    got = build(path, tokens=dict.fromkeys(BUDGETS, 320))
    assert got.starts_with_bos
    assert got.notes == ()
    np.save(tmp_path / "rows.npy", np.arange(2, 4002).reshape(100, 40))
    assert not build(tmp_path / "rows.npy", tokens=dict.fromkeys(BUDGETS, 320)).starts_with_bos


def test_several_files_are_one_text(tmp_path: Path) -> None:
    paths = []
    for k in range(5):
        paths.append(tmp_path / f"part{k}.jsonl")
        lines = [
            json.dumps({"text": " ".join(f"w{1000 * k + 20 * i + j}" for j in range(20))}) for i in range(50)
        ]
        paths[-1].write_text("\n".join(lines))
    got = build(*paths)
    assert got.description == "part0.jsonl, part1.jsonl, part2.jsonl and 2 more"
    thousands = set((got.split.sequences[:, 1] // 1000).tolist())
    assert thousands == {0, 1, 2, 3, 4}
