"""Damaged calibration data: .npy, .bin, .jsonl and .txt files, each as `--data` takes them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from fuzzing.mutate import HOSTILE, HOSTILE_TEXT, Mutate, bytes_changed, value_changed

DTYPES = ("int8", "uint16", "int64", "uint64", "float32", "float64", "complex64", "bool", "S3", "U2", ">i4")
SHAPES = ((0,), (0, 32), (40, 32), (1, 1280), (1280, 1), (2, 5, 128), (), (40, 1), (1, 10**9), (2**40, 2**20))


def npy_header(rng: random.Random, source: Path, target: Path) -> None:
    """A .npy file whose header says something else than its bytes hold."""
    header = {
        "descr": rng.choice((*(np.dtype(d).str for d in DTYPES), "|O", "x", [("a", "<i4")])),
        "fortran_order": rng.choice((False, True, 1, None)),
        "shape": rng.choice(SHAPES),
    }
    text = repr(header) if rng.random() < 0.8 else repr(value_changed(rng, header))
    data = text.encode("utf-8", "surrogatepass")[:65000] + b"\n"
    body = source.read_bytes()[128:]
    target.write_bytes(b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data + body)


def npy_values(rng: random.Random, source: Path, target: Path) -> None:
    """A sound .npy file of other values."""
    ids = np.load(source).astype(rng.choice(DTYPES[:8]))
    for _ in range(rng.choice((1, 10, 1000))):
        place = tuple(rng.randrange(size) for size in ids.shape)
        with np.errstate(all="ignore"):
            ids[place] = np.array(rng.choice((0, 1, 96, 97, 127, float("nan"), float("inf")))).astype(
                ids.dtype
            )
    if rng.random() < 0.3:
        ids = np.full_like(ids, ids.flat[0])
    np.save(target, ids.reshape(rng.choice((ids.shape, (-1,), ids.shape[::-1], (1, *ids.shape)))))


def bin_values(rng: random.Random, source: Path, target: Path) -> None:
    """Token ids without a header, of another width or count."""
    ids = np.fromfile(source, np.uint16)
    content = ids.astype(rng.choice(("uint8", "uint16", "uint32", ">u2"))).tobytes()
    target.write_bytes(content[: rng.choice((0, 1, 3, 100, len(content) - 1, len(content)))])


def text_lines(rng: random.Random, source: Path, target: Path) -> None:
    """JSON lines of which some have another `text`, or none."""
    lines = source.read_text(encoding="utf-8").splitlines()
    for _ in range(rng.choice((1, 3, len(lines)))):
        line = {"text": rng.choice((*HOSTILE, rng.choice(HOSTILE_TEXT) * 50))}
        lines[rng.randrange(len(lines))] = json.dumps(rng.choice((line, {}, [line], line["text"])))
    target.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def odd_text(rng: random.Random, source: Path, target: Path) -> None:
    """Text in another encoding, of one character, or of none that a tokenizer knows."""
    text = source.read_text(encoding="utf-8")
    encoding = rng.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-8"))
    text = rng.choice(
        (text, text[:1] * len(text), "\x00" * 5000, "\u202e" * 5000, "\U0001f600" * 5000, "\n" * 5000)
    )
    target.write_bytes(text.encode(encoding, "replace"))


def _bytes(rng: random.Random, source: Path, target: Path) -> None:
    target.write_bytes(bytes_changed(rng, source.read_bytes()))


MUTATORS: dict[str, Mutate] = {
    "ids.npy: header": npy_header,
    "ids.npy: values": npy_values,
    "ids.bin: values": bin_values,
    "lines.jsonl: text": text_lines,
    "text.txt: odd": odd_text,
    "ids.npy: bytes": _bytes,
    "lines.jsonl: bytes": _bytes,
}
