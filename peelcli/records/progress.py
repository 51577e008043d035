"""The progress of a stage: stages yield it, and the console shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `stage` are finished. detail: the last one, such as "layer 3".

    note: a sentence for the user, which stays where the rest is shown in passing.
    """

    stage: str
    done: int
    total: int
    detail: str = ""
    note: str = ""
