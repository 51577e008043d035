"""How far a stage has come: what the stages yield between their results, and the console shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `stage` are finished; `detail` names the last one, such as "layer 3".

    note: a sentence for the user, which stays where the rest is shown in passing.
    """

    stage: str
    done: int
    total: int
    detail: str = ""
    note: str = ""
