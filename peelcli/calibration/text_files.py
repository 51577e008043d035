"""Read text files in bounded memory. From a file above the limit only evenly spaced slices are read."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from peelcli.calibration.files import spread_slices
from peelcli.errors import CalibrationError

_SLICE_BYTES = 1 << 20
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 begins with the same bytes
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


def default_text() -> str:
    """The language reference that is part of every CPython, with each paragraph once.

    Its topics quote each other at length; a paragraph that came twice could land in two parts of the split.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CalibrationError(
            "the default calibration text, pydoc_data.topics: expected with every CPython, not found in this "
            "one; pass text with --data FILE.txt"
        ) from error
    paragraphs = (piece.strip("\n") for key in sorted(topics) for piece in topics[key].split("\n\n"))
    return "\n\n".join(dict.fromkeys(piece for piece in paragraphs if piece))


def read_documents(paths: Sequence[Path], max_bytes: int, rng: np.random.Generator) -> list[str]:
    """The documents of .txt and .jsonl files, in order, at most `max_bytes` of text in total.

    A .txt is one document, and so is each line's `text` in a .jsonl. Raises CalibrationError on what is not
    UTF-8 and on malformed lines.
    """
    documents: list[str] = []
    for path in paths:
        read = _read_lines if path.suffix.lower() == ".jsonl" else _read_text
        try:
            size = path.stat().st_size
            for start, stop in spread_slices(size, max_bytes // len(paths), _SLICE_BYTES, rng):
                with path.open("rb") as file:
                    file.seek(start)
                    data = file.read(stop - start)
                _require_text(path, data, start)
                documents.extend(read(path, data, start, stop >= size))
        except OSError as error:
            raise CalibrationError(f"{path}: cannot be read ({error}); check its permissions") from error
    return documents


def _require_text(path: Path, data: bytes, start: int) -> None:
    """Raise CalibrationError for bytes in another encoding, even if they happen to be valid UTF-8."""
    convert = "convert it: `iconv -f UTF-16 -t UTF-8 FILE > NEW`"
    if start == 0 and data.startswith(_UTF16):
        raise CalibrationError(
            f"{path}: expected UTF-8 text, found UTF-16 (by its first two bytes); {convert}"
        )
    zeros = data.count(0)
    if zeros > len(data) / 100:  # a text scraped from somewhere may hold a few
        raise CalibrationError(
            f"{path}: expected text, found {zeros:,} zero bytes from byte {start} on: the file is binary, or UTF-16 "
            f"without a mark. If it is text, {convert}; token ids belong in a .npy or .bin file"
        )


def _read_text(path: Path, data: bytes, start: int, is_last: bool) -> Iterator[str]:
    """One document. A slice from the middle of a file begins after its first break and ends at its last."""
    if start > 0:
        first = _BLANK_LINE.search(data) or re.search(rb"\n", data) or re.match(rb"[\x80-\xbf]{0,3}", data)
        dropped = first.end() if first else 0
        data, start = data[dropped:], start + dropped
    if not is_last:
        last = max(data.rfind(b"\n\n"), data.rfind(b"\n\r\n"))
        last = last if last > 0 else data.rfind(b"\n")
        data = data[:last] if last > 0 else data
    try:
        # Incremental, because a slice without a line break may end within a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=is_last)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: expected UTF-8 text, found byte 0x{data[error.start]:02x} at byte "
            f"{start + error.start} that is none; convert it, from Latin-1 for example: "
            "`iconv -f LATIN1 -t UTF-8 FILE > NEW`; a compressed file must be unpacked first"
        ) from error
    yield text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _read_lines(path: Path, data: bytes, start: int, is_last: bool) -> Iterator[str]:
    """The `text` field of each complete line in the slice."""
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not is_last:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (start > 0 and number == 1):  # the first line of a slice is a part of one
            continue
        where = f"line {number}" if start == 0 else f"line {number} of the slice at byte {start}"
        yield _line_text(line, f"{path}, {where}")


def _line_text(line: bytes, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CalibrationError(
            f"{where}: expected a JSON object in UTF-8 on a line of its own, found {error}; mend the line"
        ) from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"the fields {sorted(record)[:8]}" if isinstance(record, dict) else type(record).__name__
        remedy = "rename the field that holds the text to `text`, or write the text alone to a .txt file"
        if isinstance(record, dict) and "input_ids" in record:
            remedy = "token ids belong in a .npy file: numpy.save them, one sequence a row, and pass that"
        elif isinstance(record, list):
            remedy = "write one object a line, in place of one array in the whole file"
        raise CalibrationError(f"{where}: expected an object with a string `text`, found {found}; {remedy}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: `text` holds half a surrogate pair ({error}); mend the line"
        ) from error
    return text.replace("\r\n", "\n")
