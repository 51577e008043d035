"""A tokenizer that cannot be used is refused by its file, with a remedy that works; and what it marks as padding."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from peelcli.calibration import Calibration, build_calibration
from peelcli.checkpoint.files import CheckpointFiles
from peelcli.checkpoint.tokenizer import load_tokenizer, special_ids
from peelcli.errors import CalibrationError

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "went", "home", "again"]
MARKS = ("<pad>", "<s>", "</s>", "<unk>")


def save_tokenizer(directory: Path, words: list[str] = WORDS) -> Path:
    """A tokenizer of few words, in a directory of a Llama's config."""
    vocabulary = {word: number for number, word in enumerate([*MARKS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(directory)
    LlamaConfig().save_pretrained(directory)
    return directory


def refusal(directory: Path) -> str:
    with pytest.raises(CalibrationError) as refused:
        load_tokenizer(directory)
    message = str(refused.value)
    assert "trust_remote_code" not in message, "an option that peel has not"
    assert "--data FILE.npy" in message
    assert "\n" not in message
    return message


def calibrate(directory: Path, text: str, vocab_size: int = 16) -> Calibration:
    (directory / "text.txt").write_text(text)
    budgets = {"fit": 128, "select": 128, "eval": 128}
    return build_calibration(
        [directory / "text.txt"], load_tokenizer(directory), vocab_size, 64, 8, budgets, seed=0
    )


def story(words: list[str] = WORDS, length: int = 4000) -> str:
    return " ".join(np.random.default_rng(0).choice(words, size=length))


@pytest.mark.parametrize(
    "settings", [{"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "GPT2Tokenizer"}, {}]
)
def test_settings_without_a_vocabulary_name_the_file_that_is_missing(
    settings: dict[str, str], tmp_path: Path
) -> None:
    LlamaConfig().save_pretrained(tmp_path / "ckpt")
    (tmp_path / "ckpt" / "tokenizer_config.json").write_text(json.dumps(settings))
    message = refusal(tmp_path / "ckpt")
    assert (
        "tokenizer_config.json: names a tokenizer, but no file with its vocabulary lies beside it" in message
    )
    assert "Copy tokenizer.json and tokenizer_config.json of the model that it was trained from" in message
    base = save_tokenizer(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as it says
        shutil.copy(base / name, tmp_path / "ckpt")
    assert len(load_tokenizer(tmp_path / "ckpt")) == len(MARKS) + len(WORDS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "named", [{"AutoTokenizer": ["tokenization_my.MyTok", None]}, ["tokenization_my.MyTok", None]]
)
def test_a_tokenizer_of_own_code_is_never_run_and_ids_are_asked_for(named: object, tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "tokenization_my.py").write_text("raise SystemExit('this code was run')")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "MyTok", "auto_map": named})
    )
    message = refusal(tmp_path)
    assert "tokenizer_config.json: the tokenizer is code of the checkpoint's own" in message
    assert "'tokenization_my.MyTok'" in message
    assert "numpy.save" in message


def test_a_missing_package_is_named_with_the_file_that_needs_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("sentencepiece") and importlib.util.find_spec("tiktoken"):
        pytest.skip("needs an environment without sentencepiece or tiktoken")
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0bx")
    message = refusal(tmp_path)
    assert "tokenizer.model: cannot be read without the package" in message
    assert "pip install" in message
    assert "tokenizer.json" in message


def test_a_damaged_vocabulary_is_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "its tokenizer (tokenizer.json) cannot be opened" in refusal(tmp_path)


def test_a_directory_without_a_tokenizer_has_none_and_one_of_bytes_needs_no_file(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert len(load_tokenizer(tmp_path)("ab")["input_ids"]) == 3  # type: ignore[misc]


def without_unknown(directory: Path) -> None:
    """A tokenizer of letters that passes over every other sign."""
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, []))).save_pretrained(directory)


def with_undeclared(directory: Path) -> None:
    """The vocabulary has a token for what is unknown, and nobody told transformers."""
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer.pop("unk_token")
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def as_saved(directory: Path) -> None:
    pass


ALL_UNKNOWN = [
    (as_saved, "of its tokens are <unk>"),
    (with_undeclared, "of its tokens are <unk>"),
    (without_unknown, "it drops 73% of it"),
]


@pytest.mark.parametrize(("change", "found"), ALL_UNKNOWN)
def test_text_that_the_tokenizer_does_not_know_is_no_lack_of_text(
    change: Callable[[Path], None], found: str, tmp_path: Path
) -> None:
    change(save_tokenizer(tmp_path))
    with pytest.raises(CalibrationError) as refused:
        calibrate(tmp_path, "这是一个 cat 测试文本 " * 500)
    message = str(refused.value)
    assert "text.txt: the checkpoint's tokenizer" in message
    assert found in message
    assert "text in the model's language" in message
    assert "more text" not in message


def test_a_part_that_the_tokenizer_does_not_know_is_a_finding(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    assert calibrate(tmp_path, story()).findings == ()
    (finding,) = calibrate(tmp_path, story([*WORDS, "x", "y"])).findings
    assert finding.kind == "unknown-tokens"
    assert "% of the tokens of text.txt are <unk>" in finding.message


def test_a_tokenizer_of_another_size_than_the_embedding_is_a_finding_or_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, [*WORDS, "rare", "rarer"])
    (beyond,) = calibrate(tmp_path, story(), vocab_size=16).findings
    assert beyond.kind == "tokenizer"
    assert "the tokenizer has 18 entries and the model's embedding 16" in beyond.message
    (small,) = calibrate(tmp_path, story(), vocab_size=1000).findings
    assert "18 entries and the model's embedding 1,000" in small.message
    with pytest.raises(
        CalibrationError, match=r"token id \d+ .*with 18 entries, does not belong to this checkpoint"
    ):
        calibrate(tmp_path, story(), vocab_size=10)


def test_padding_that_a_text_spells_out_is_left_out_and_counted(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    words = story().split()
    text = "\n".join(" ".join(words[at : at + 40]) + " <pad> <pad>" for at in range(0, 4000, 40))
    got = calibrate(tmp_path, text)
    assert (got.split.sequences != 0).all()
    assert "spells out 200 pad tokens ('<pad>')" in got.findings[0].message


def test_pad_ids_are_gathered_from_every_file_that_names_one(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7], "pad_token_id": 9}')
    config = {"pad_token_id": -1, "bos_token_id": 1, "text_config": {"pad_token_id": 5}}
    got = special_ids(CheckpointFiles(tmp_path, config, {}, "safetensors", ()))
    assert (got.bos, got.eos, got.pad) == ({1}, {2, 7}, {0, 5, 9})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text("{")
    got = special_ids(CheckpointFiles(tmp_path, config, {}, "safetensors", ()))
    assert got.pad == {5}, "token ids are no matter of a damaged tokenizer"
