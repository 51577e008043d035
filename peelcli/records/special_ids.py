"""The token ids that a checkpoint's files give a special meaning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialIds:
    """The ids that the checkpoint's files give a special meaning."""

    bos: frozenset[int] = frozenset()
    eos: frozenset[int] = frozenset()
    pad: frozenset[int] = frozenset()


NO_SPECIAL_IDS = SpecialIds()
