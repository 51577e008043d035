"""Reading text: what is read is what stands in the file, in bounded memory, and errors say where."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peelcli.calibration.files import holds_text, spread_slices
from peelcli.calibration.text_files import default_text, read_documents
from peelcli.errors import CalibrationError


def read(*paths: Path, max_bytes: int = 1 << 26) -> list[str]:
    return read_documents(paths, max_bytes, np.random.default_rng(0))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 10**4), st.integers(0, 5))
def test_slices_are_disjoint_bounded_and_spread(size: int, limit: int, length: int, seed: int) -> None:
    slices = spread_slices(size, limit, length, np.random.default_rng(seed))
    if size <= limit:
        assert slices == [(0, size)]
        return
    assert all(0 <= start < stop <= size for start, stop in slices)
    assert all(stop <= start for (_, stop), (start, _) in zip(slices, slices[1:], strict=False))
    taken = sum(stop - start for start, stop in slices)
    assert limit / 2 < taken <= limit
    stride = size / len(slices)
    assert all(i * stride - 1 <= start <= (i + 1) * stride for i, (start, _) in enumerate(slices))


def test_documents_of_all_files_in_order(tmp_path: Path) -> None:
    lines = [{"text": "one\r\ntwo"}, {"id": 7, "text": "drei \u00fc"}]
    jsonl = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\r\n"
    first = written(tmp_path / "a.jsonl", jsonl.encode())
    second = written(tmp_path / "b.TXT", "\ufeffvier\r\n\r\nfünf".encode())
    assert read(second, first) == ["vier\n\nfünf", "one\ntwo", "drei ü"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"{not json", "Expecting property name"),
        (b'{"txt": "a"}', "txt"),
        (b'{"text": 3}', "text"),
        (b'["text"]', "list"),
        (b'{"text": "\xff"}', "can't decode"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 200_000, "recursion"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, found: str) -> None:
    path = written(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(CalibrationError, match=rf"a\.jsonl, line 3: (?s:.*){found}"):
        read(path)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"latin\.txt: expected UTF-8 text, found byte 0xe9 at byte 3"):
        read(written(tmp_path / "latin.txt", b"caf\xe9 au lait"))


def test_bytes_that_are_no_utf8_in_a_slice_are_named_by_their_place_in_the_file(tmp_path: Path) -> None:
    content = b"fine\n\n" * 600_000 + b"caf\xe9\n\n" * 200_000
    with pytest.raises(CalibrationError, match="found byte 0xe9 at byte") as caught:
        read(written(tmp_path / "latin.txt", content), max_bytes=1 << 21)
    place = int(str(caught.value).split("at byte ")[1].split()[0])
    assert content[place : place + 1] == b"\xe9"


@pytest.mark.parametrize("between", ["\n\n", "\n", " ", ""])
def test_a_large_text_is_read_in_slices_that_begin_and_end_at_breaks(tmp_path: Path, between: str) -> None:
    paragraphs = [f"§{i}→{'ü' * (i % 7)}" for i in range(200_000)]
    text = between.join(paragraphs)
    path = written(tmp_path / "large.txt", text.encode())
    slices = read(path, max_bytes=1 << 21)
    assert len(slices) == 2
    assert sum(len(piece.encode()) for piece in slices) <= 1 << 21
    for piece in slices:
        assert piece in text
        if between.strip(" "):
            pieces = piece.strip().split(between)
            assert set(pieces[1:-1]) <= set(paragraphs)
            assert pieces[-1] in paragraphs, "the end is cut at a break"
            assert text.startswith(piece) or pieces[0] in paragraphs, "the beginning is cut at a break"


def test_a_large_jsonl_is_read_in_whole_lines(tmp_path: Path) -> None:
    texts = [f"document {i} of many, {'é' * (i % 50)}" for i in range(60_000)]
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n"
    path = written(tmp_path / "large.jsonl", content.encode())
    got = read(path, max_bytes=1 << 21)
    assert set(got) <= set(texts)
    assert 0 < sum(map(len, got)) < 1 << 21
    numbers = [int(text.split()[1]) for text in got]
    assert min(numbers) < 30_000 < max(numbers)


def test_a_malformed_line_in_a_slice_is_named_by_its_bytes(tmp_path: Path) -> None:
    content = (json.dumps({"text": "x" * 80}) + "\n").encode() * 40_000 + b"oops\n" * 200_000
    with pytest.raises(CalibrationError, match=r"line \d+ of the slice at byte \d+"):
        read(written(tmp_path / "large.jsonl", content), max_bytes=1 << 21)


def test_suffixes_decide_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    text, ids, other = (written(tmp_path / name, b"x") for name in ("a.txt", "a.bin", "a.parquet"))
    assert holds_text([text, text])
    assert not holds_text([ids])
    with pytest.raises(CalibrationError, match=r"a\.parquet: .*\.txt, \.jsonl .*\.npy or \.bin.*'\.parquet'"):
        holds_text([text, other])
    with pytest.raises(CalibrationError, match="either text or token ids, found both"):
        holds_text([text, ids])
    with pytest.raises(CalibrationError, match=r"gone\.txt: expected a file, found none"):
        holds_text([tmp_path / "gone.txt"])
    with pytest.raises(CalibrationError, match="expected a file, found none"):
        holds_text([tmp_path])


def test_the_default_text_is_the_language_reference_each_paragraph_once() -> None:
    text = default_text()
    paragraphs = text.split("\n\n")
    assert len(text) > 100_000
    assert 'The "while" statement' in text
    assert len(set(paragraphs)) == len(paragraphs)
