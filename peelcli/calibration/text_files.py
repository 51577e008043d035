"""Text from files, in bounded memory: of a file beyond the limit only evenly spread slices are read."""

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
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


def default_text() -> str:
    """The language reference that every CPython carries, each paragraph once.

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
    """The documents of .txt and .jsonl files, in order, at most `max_bytes` of text in all.

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
                    documents.extend(read(path, file.read(stop - start), start, stop >= size))
        except OSError as error:
            raise CalibrationError(f"{path}: cannot be read ({error}); check its permissions") from error
    return documents


def _read_text(path: Path, data: bytes, start: int, is_last: bool) -> Iterator[str]:
    """One document; where the slice was cut out of the file, from its first break on up to its last."""
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
            f"{start + error.start} that is none; convert the file to UTF-8"
        ) from error
    yield text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _read_lines(path: Path, data: bytes, start: int, is_last: bool) -> Iterator[str]:
    """The `text` of each whole line in the slice."""
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
            f"{where}: expected a JSON object in UTF-8, found {error}; mend the line"
        ) from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"the fields {sorted(record)[:8]}" if isinstance(record, dict) else type(record).__name__
        raise CalibrationError(
            f"{where}: expected an object with a string `text`, found {found}; mend the line"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: `text` holds half a surrogate pair ({error}); mend the line"
        ) from error
    return text.replace("\r\n", "\n")
