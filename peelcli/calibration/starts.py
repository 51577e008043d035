"""The places in a text where a sequence may begin: a paragraph, the best alternative, or any word."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Every pattern is linear in the text it scans: what follows the break is skipped by a second search, because
# one pattern for both would go over long runs of blank lines again and again.
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_FALLBACKS = tuple(re.compile(pattern) for pattern in (r"\n", r"[.!?][\"')\]”’]*\s|[。！？]", r"\s"))
_INK = re.compile(r"\S")
_GAP = re.compile(r"\s")
_LONGEST_WORD = 64  # characters; beyond that the text has no spaces, and a start may be anywhere

Place = tuple[int, int]  # (document, character in it)


def next_start(documents: Sequence[str], place: Place, reach: int | None) -> Place | None:
    """The first place at or after `place` where a sequence may begin; None if there is none.

    In this order, within `reach` characters: the start of `place`'s own document, a paragraph in it, the
    start of the next document, a line, the end of a sentence, a word; else `place` itself. With `reach` None
    only documents' starts count.
    """
    document, position = place
    if document >= len(documents):
        return None
    if position == 0:
        return place
    text = documents[document]
    following = (document + 1, 0) if document + 1 < len(documents) else None
    if reach is None or position >= len(text):
        return following
    limit = position + reach
    start = _after(_PARAGRAPH, text, position, limit)
    if start is not None:
        return document, start
    if following is not None and limit >= len(text):
        return following
    for pattern in _FALLBACKS:
        start = _after(pattern, text, position, limit)
        if start is not None:
            return document, start
    ink = _INK.search(text, position)
    return (document, ink.start()) if ink else following


def next_word(documents: Sequence[str], place: Place) -> Place | None:
    """The first place at or after `place` where a word begins, including the space before it; None at the end.

    A model whose training sequences were cut from running text, with no mark before them, knows such starts, and it
    does not know the beginning of a paragraph out of the blue.
    """
    document, position = place
    if document >= len(documents):
        return None
    text = documents[document]
    if position == 0:
        return place
    if position >= len(text):
        return next_word(documents, (document + 1, 0))
    gap = _GAP.search(text, position, position + _LONGEST_WORD)
    return document, gap.start() if gap else position


def _after(pattern: re.Pattern[str], text: str, position: int, limit: int) -> int | None:
    """The position after the first break at or after `position`."""
    # A token may have swallowed the break itself, so look two characters back: `position` may be a start.
    found = pattern.search(text, max(0, position - 2), limit)
    while found and found.end() < position:
        found = pattern.search(text, found.start() + 1, limit)
    ink = _INK.search(text, found.end()) if found else None
    return ink.start() if ink else None
