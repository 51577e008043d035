"""Make text from a file safe to print: one line that neither a terminal nor a CI runner takes for a command."""

from __future__ import annotations

import re

LONGEST = 1000  # characters of one piece of text: a hostile name must not flood the output
# What begins a command of a CI runner that reads what is printed. GitHub's runner skips spaces before `::` and finds
# `##[` anywhere in a line; Azure's finds `##vso[`. Text may also be wrapped later, so each place can begin a line.
_COMMAND = re.compile(r"::|##(?=\w*\[)")
# str.isprintable takes these for printable, and a terminal shows nothing where they stand.
_INVISIBLE = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F),  # combining grapheme joiner
        (0x115F, 0x1160),  # Hangul fillers
        (0x17B4, 0x17B5),  # Khmer inherent vowels
        (0x180B, 0x180F),  # Mongolian variation selectors
        (0x3164, 0x3164),  # Hangul filler
        (0xFE00, 0xFE0F),  # variation selectors
        (0xFFA0, 0xFFA0),  # halfwidth Hangul filler
        (0xE0100, 0xE01EF),  # more variation selectors
    )
    for code in range(first, last + 1)
)


class _Spelling(dict[int, str]):
    """Table for `str.translate`: a character and how it is shown, computed when it first occurs."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        shown = char if is_visible(char) else char.encode("unicode_escape").decode("ascii")
        self[code] = shown
        return shown


_SPELLING = _Spelling()


def is_visible(char: str) -> bool:
    """Whether a character can be printed unchanged: no control, no direction mark, no character without width."""
    return char.isprintable() and char not in _INVISIBLE


def printable(text: str, longest: int = LONGEST, tail: int = 0) -> str:
    r"""`text` in one line of limited length, without control characters, terminal escapes and direction marks.

    What is not visible is written as Python writes it (`\x1b`, `\n`, `\u202e`, `\udc80`), and so is what a CI
    runner would read as a command (`:\x3aerror:\x3a`). Of text longer than `longest` the last `tail` characters are
    kept too: the end of a message says what to do.
    """
    if len(text) <= longest:
        shown = _spelt(text)
        if len(shown) <= longest:
            return shown
        text = shown  # every escape is a few characters
    head = longest - tail
    left_out = len(text) - longest
    end = f" ... {_spelt(text[-tail:])}" if tail else ""
    return f"{_spelt(text[:head])[:head]}... ({left_out} more characters){end}"


def harmless_json(text: str) -> str:
    """The JSON document with equal values in which no line begins with `::`, which CI runners take for a command."""
    return _COMMAND.sub(lambda found: "#\\u0023" if found[0] == "##" else found[0], text)


def _spelt(text: str) -> str:
    return _COMMAND.sub(lambda found: f"{found[0][0]}\\x{ord(found[0][1]):02x}", text.translate(_SPELLING))
