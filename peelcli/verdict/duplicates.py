"""Checkpoints that should differ and don't: the same weights under two names, a layer that did not move between two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peelcli.records import Finding, Run


def note_identical(runs: Sequence[Run]) -> list[Run]:
    """The runs, oldest first, each with findings on what an earlier one of another path holds byte for byte.

    One "identical-checkpoint" where everything is the same; else an "identical-layer" for each layer that the newest
    earlier run has too, be it under another number.
    """
    noted = []
    for index, run in enumerate(runs):
        earlier = [r for r in reversed(runs[:index]) if r.checkpoint != run.checkpoint]
        noted.append(replace(run, findings=(*run.findings, *_findings(run, earlier))))
    return noted


def _findings(run: Run, earlier: Sequence[Run]) -> list[Finding]:
    for other in earlier:
        if other.checkpoint_id == run.checkpoint_id:
            message = (
                f"{run.checkpoint} holds the same tensors as {other.checkpoint}, byte for byte: one of the two is not "
                "the checkpoint that its name says."
            )
            return [Finding("identical-checkpoint", message)]
    found = []
    for layer, digest in sorted((int(n), d) for n, d in run.layer_hashes.items()):
        for other in earlier:
            same = [int(n) for n, theirs in other.layer_hashes.items() if theirs == digest]
            if same:
                # Its own number first: where layers are twins, the one that did not move is what to tell.
                number = layer if layer in same else min(same)
                message = (
                    f"layer {layer} of {run.checkpoint} is, byte for byte, layer {number} of {other.checkpoint}: "
                    "frozen, never updated, or restored from there."
                )
                found.append(Finding("identical-layer", message, layer=layer))
                break
    return found
