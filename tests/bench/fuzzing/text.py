"""Mutations of the text files that peel reads: JSON (baselines, histories, trainer_state.json) and YAML.

Each function takes the text of a sound file and a `random.Random`, and returns the bytes of a mutation.
"""

from __future__ import annotations

import json
import random
from typing import Any

from fuzzing.hdf5 import HOSTILE_JSON, exchange, flip, overwrite, splice, truncate

DEEP_JSON = ("[" * 100_000, '{"a":' * 50_000, "[" * 900 + "]" * 900)
HOSTILE_TEXT = (
    "",
    "\0",
    "\ufeff",
    "null",
    "[]",
    "{}",
    "0",
    '"x"',
    "NaN",
    "9" * 5000,
    '"\\ud800"',
    "{" * 5000,
    "\xff",
)


def mutate_json(text: str, rng: random.Random) -> bytes:
    """One JSON value, changed in its text or in one of its values."""
    if rng.random() < 0.4:
        return _bytes(text, rng)
    value = json.loads(text)
    where: Any = value
    exchange(where, rng)
    return json.dumps(value).encode()


def mutate_lines(text: str, rng: random.Random) -> bytes:
    """One JSON value a line: a line changed, doubled or left out."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    change = rng.choice(("mutate", "double", "drop", "join"))
    if change == "mutate":
        return (
            b"\n".join([line.encode() if n != at else mutate_json(line, rng) for n, line in enumerate(lines)])
            + b"\n"
        )
    changed = {"double": [*lines, lines[at]], "drop": lines[:at] + lines[at + 1 :], "join": ["".join(lines)]}[
        change
    ]
    return "\n".join(changed).encode()


def mutate_yaml(text: str, rng: random.Random) -> bytes:
    """A configuration, changed in its text, in one of its values, or by what YAML alone can do."""
    kind = rng.choice(("bytes", "value", "special"))
    if kind == "bytes":
        return _bytes(text, rng)
    if kind == "special":
        return rng.choice(YAML).encode("utf-8", "surrogatepass")
    lines = text.splitlines()
    settings = [n for n, line in enumerate(lines) if ":" in line and not line.strip().startswith("#")]
    at = rng.choice(settings)
    key = lines[at].partition(":")[0]
    lines[at] = f"{key}: {json.dumps(rng.choice(HOSTILE_JSON))}"
    return "\n".join(lines).encode()


def _bytes(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return rng.choice((*DEEP_JSON, *HOSTILE_TEXT)).encode("utf-8", "surrogatepass")
    return rng.choice((flip, overwrite, truncate, splice))(text.encode(), rng)


def _bomb() -> str:
    names = "abcdefghij"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{n}: &{n} [{', '.join([f'*{before}'] * 9)}]" for before, n in zip(names, names[1:], strict=False)
    ]
    return "\n".join(lines)


YAML = (
    _bomb(), "a: &a [*a]", "&a [*a]", "fit: &f {seed: 1, again: *f}", "[" * 100_000,
    "a: " + "{a: " * 20_000, "- " * 50_000,
    "? " * 50_000, "\n".join(" " * n + "a:" for n in range(300)), "fit: {seed: " + "9" * 5000 + "}",
    "fit: {seed: 0x" + "f" * 50_000 + "}", "fit: {seed: " + "1:" * 10_000 + "1}", "fit: {learning_rate: .nan}",
    "fit: {learning_rate: 1e999}", 'fit: {scheme: "a\\0b"}', 'extract: {data: ["\\0"]}', 'fit: {scheme: "\\ud800"}',
    "fit: {1: 2}", "? [a]\n: 1", "null: 1", "2001-01-01: 1", "fit: {seed: 2001-99-99}", "fit: !!set {seed}",
    "fit: !!binary x", "!!python/object/apply:os.getcwd []", "fit: {<<: *nowhere}", "fit: {seed: 1}\nfit: {seed: 2}",
    "%YAML 9.9\n---\n", "---\n---\n", "fit: {seed: ~}", "fit: {seed: -1}", "fit: {threads: 1000000000000}",
    "\ufeff", "\0",
)  # fmt: skip
