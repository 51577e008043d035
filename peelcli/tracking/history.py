"""The history of a run's audits: one JSON object per line, only ever appended, by any number of writers.

A line is written whole or not at all: with one call, under the file's lock, and taken back where the disk is full. What
a crash has left of a line is closed off before the next, so that it spoils no other.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peelcli import __version__
from peelcli.errors import ArtefactError, ResourceError
from peelcli.records import VERDICTS, AuditResult, HistoryEntry, HistoryLayer, HistoryNetwork
from peelcli.records.from_json import from_json
from peelcli.runtime import durable
from peelcli.runtime.locks import open_locked
from peelcli.runtime.small_files import parse_json, require_regular

SCHEMA, SCHEMA_VERSION = "peel/history", 1
_PAUSE_SECONDS = 0.01
_LARGEST = 2**26  # bytes: some thousand audits


@dataclass(frozen=True)
class History:
    """The audits of a history in file order, and warnings about damaged lines."""

    entries: tuple[HistoryEntry, ...]
    warnings: tuple[str, ...] = ()


def entry_of(result: AuditResult, time: str = "") -> HistoryEntry:
    """The history entry of a result. Figures that are not finite are left out."""
    run, network = result.run, result.network
    layers = tuple(
        HistoryLayer(
            layer=v.layer,
            verdict=v.verdict,
            flagged=v.layer in result.flagged,
            sublayer=v.sublayer,
            score=_finite(v.score),
            gap=_finite(v.gap),
            gap_interval=v.gap_interval
            if v.gap_interval and all(map(math.isfinite, v.gap_interval))
            else None,
            reference_key=v.reference.key if v.reference else None,
            effective_bits=v.effective_bits,
            fvu=_finite(v.fvu),
            drop_cost=_finite(v.drop_cost),
        )
        for v in result.layers
    )
    return HistoryEntry(
        time=time or datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        checkpoint=run.checkpoint,
        checkpoint_id=run.checkpoint_id,
        num_layers=run.num_layers,
        flagged=bool(result.flagged or result.network_flagged),
        network=HistoryNetwork(_finite(network.ce), _finite(network.perplexity), network.zone, network.flags),
        layers=layers,
        step=run.step,
        scheme=run.scheme,
        data_hash=run.data_hash,
        flagged_layers=result.flagged,
        peel_version=__version__,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def append_history(path: Path, entries: Sequence[HistoryEntry]) -> int:
    """Append the entries that the history lacks, not comparing their times; returns how many were appended.

    Raises ResourceError where the file cannot be written, and leaves it as it was.
    """
    try:
        with _locked(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
            text = _read(file)
            known = {_essence(entry) for entry in _parse(text, path).entries}
            new = [entry for entry in entries if _essence(entry) not in known]
            if new:
                lines = "".join(_line(entry) for entry in new)
                _append(file, ("\n" if text and not text.endswith(b"\n") else "").encode() + lines.encode())
                if not text:
                    durable.sync_directory(path.parent)
            return len(new)
    except OSError as error:
        raise ResourceError(
            f"{path}: the history cannot be written ({error.strerror}); name another file with --history"
        ) from error


def read_history(path: Path) -> History:
    """The audits of a history, with a warning for each bad line. Raises ArtefactError if the file is unreadable."""
    try:
        with _locked(path, os.O_RDONLY) as file:
            return _parse(_read(file), path)
    except OSError as error:
        raise ArtefactError(
            f"{path}: the history cannot be read ({error.strerror}); `peel audit --history FILE` makes one"
        ) from error


@contextlib.contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    """The file's descriptor, locked for reading or for writing until the context ends."""
    # A pipe without a writer would block at its opening.
    flags |= getattr(os, "O_NONBLOCK", 0)
    while (file := open_locked(path, flags, shared=not flags & os.O_RDWR)) is None:
        time.sleep(_PAUSE_SECONDS)  # a line takes another no longer than that
    try:
        require_regular(file, path, _LARGEST)
        yield file
    finally:
        os.close(file)


def _read(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _append(file: int, data: bytes) -> None:
    size = os.fstat(file).st_size
    try:
        durable.write_all(file, data)
        durable.sync(file)
    except BaseException:
        os.ftruncate(file, size)
        raise


def _line(entry: HistoryEntry) -> str:
    value = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(entry)}
    return json.dumps(value, allow_nan=False, separators=(",", ":")) + "\n"


def _essence(entry: HistoryEntry) -> HistoryEntry:
    return replace(entry, time="", peel_version="")


def _parse(text: bytes, path: Path) -> History:
    entries, warnings = [], []
    lines = text.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(_entry(parse_json(line)))
        except ValueError as error:  # text that is no UTF-8 is a ValueError, too
            cut_off = " (a write was cut off)" if number == len(lines) else ""
            warnings.append(f"{path}: line {number} is damaged{cut_off} and left out: {error}")
    return History(tuple(entries), tuple(warnings))


def _entry(value: Any) -> HistoryEntry:
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise ValueError("expected an audit")
    if value.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"has version {value.get('schema_version')!r}, and this peel reads {SCHEMA_VERSION}")
    entry = from_json(HistoryEntry, value)
    _check(entry)
    return entry


def _check(entry: HistoryEntry) -> None:
    """Raise ValueError unless the layers of an entry are numbered like those of a network."""
    if entry.num_layers < 1 or (entry.step is not None and not 0 <= entry.step < 2**53):
        raise ValueError(f"expected counts, found {entry.num_layers} layers at step {entry.step}")
    for layer in entry.layers:
        if layer.verdict not in VERDICTS:
            raise ValueError(
                f"layer {layer.layer}: expected one of {', '.join(VERDICTS)}, found {layer.verdict!r}"
            )
    numbers = [*(layer.layer for layer in entry.layers), *entry.flagged_layers]
    if not all(1 <= number <= entry.num_layers for number in numbers):
        raise ValueError(f"expected layers 1 to {entry.num_layers}, found {numbers[:20]}")
