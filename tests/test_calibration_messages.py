"""Data that cannot be used is refused by its file, with what was found and a remedy that works."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import numpy as np
import pytest
from test_calibration import TOKENIZER

from peelcli.calibration import Calibration, build_calibration
from peelcli.errors import CalibrationError

WORDS = "\n\n".join(" ".join(f"w{10 * i + j}" for j in range(10)) for i in range(300))


def build(path: Path) -> Calibration:
    budgets = {"fit": 256, "select": 256, "eval": 256}
    return build_calibration([path], TOKENIZER, 5002, 512, 32, budgets, 0)


def lines(record: object) -> bytes:
    return "\n".join(json.dumps(record) for _ in range(50)).encode()


TEXTS = {
    "utf16.txt": (WORDS.encode("utf-16"), ("found UTF-16", "iconv -f UTF-16 -t UTF-8")),
    "unmarked.txt": (WORDS.encode("utf-16-le"), ("zero bytes from byte 0", "iconv -f UTF-16")),
    "binary.txt": (
        np.arange(2000, dtype=np.int32).tobytes(),
        ("zero bytes", "token ids belong in a .npy or .bin file"),
    ),
    "latin.txt": ((WORDS + " café").encode("latin-1"), ("found byte 0xe9", "iconv -f LATIN1 -t UTF-8")),
    "packed.txt": (b"\x1f\x8b\x08" + bytes(range(1, 256)) * 9, ("found byte 0x8b", "must be unpacked first")),
    "empty.txt": (b"", ("expected text, found none", "it is empty")),
    "blank.txt": (b" \n\n\t\n" * 90, ("expected text, found none", "blanks")),
    "ids.jsonl": (lines({"input_ids": [1, 2]}), ("line 1", "['input_ids']", "numpy.save")),
    "other.jsonl": (lines({"content": "x"}), ("line 1", "['content']", "rename the field")),
    "array.jsonl": (json.dumps([{"text": "x"}]).encode(), ("line 1", "found list", "one object a line")),
    "utf16.jsonl": (lines({"text": "x"}).decode().encode("utf-16"), ("found UTF-16",)),
    "odd.bin": (b"\0\1\0", ("uint16", "3 bytes", "numpy's tofile")),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_cannot_be_read_is_named_with_the_way_out(name: str, tmp_path: Path) -> None:
    content, words = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError) as refused:
        build(tmp_path / name)
    for word in (name, *words):
        assert word in str(refused.value)


ARRAYS = {
    "floats.npy": (np.zeros((40, 32), dtype=np.float32), ("found float32 (40, 32)", ".astype('int32')")),
    "deep.npy": (
        np.ones((4, 10, 32), dtype=np.int64),
        ("found int64 (4, 10, 32)", ".reshape(-1, ids.shape[-1])"),
    ),
    "yes.npy": (np.ones((40, 32), dtype=bool), ("found bool (40, 32)", "make the ids integers")),
    "ragged.npy": (
        np.array([[1], [1, 2]], dtype=object),
        ("Python objects", "never loaded", "pad the rows", "which is left out again"),
    ),
    "labels.npy": (np.full((40, 32), -100), ("-100", "pass the input ids instead")),
    "none.npy": (np.zeros((0, 32), dtype=np.int64), ("found 0",)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_holds_no_ids_is_named_with_the_way_out(name: str, tmp_path: Path) -> None:
    array, words = ARRAYS[name]
    np.save(tmp_path / name, array, allow_pickle=True)
    with pytest.raises(CalibrationError) as refused:
        build(tmp_path / name)
    for word in (name, *words):
        assert word in str(refused.value)
    assert "allow_pickle" not in str(refused.value), "an option that peel has not"


def test_too_little_text_says_how_much_is_needed_and_found(tmp_path: Path) -> None:
    (tmp_path / "little.txt").write_text(WORDS[:600])
    with pytest.raises(
        CalibrationError, match=r"little\.txt.* 24 different .* 768 tokens .* about 1\d\d tokens.* more"
    ):
        build(tmp_path / "little.txt")
    (tmp_path / "alike.txt").write_text("w1 w2 w3\n\n" * 4000)
    with pytest.raises(CalibrationError, match=r"most of it is alike, .* pass other text"):
        build(tmp_path / "alike.txt")


def test_a_byte_order_mark_and_a_few_zero_bytes_are_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_bytes(codecs.BOM_UTF8 + WORDS.encode() + b"\0")
    got = build(tmp_path / "marked.txt")
    assert got.tokens == {"fit": 256, "select": 256, "eval": 256}
    assert got.findings == ()
