"""What should differ between checkpoints and does not is noted, with which, and what differs is not."""

from __future__ import annotations

from peelcli.records import Run
from peelcli.verdict import note_identical


def run(path: str, hashes: str) -> Run:
    """A run whose layers' hashes are the letters of `hashes`, layer 1 first."""
    numbered = {str(n): letter for n, letter in enumerate(hashes, start=1)}
    return Run(path, f"id-{hashes}", len(hashes), (1,), 0, {}, 8, "text", 97, layer_hashes=numbered)


def noted(*runs: Run) -> list[list[tuple[str, int | None]]]:
    return [[(f.kind, f.layer) for f in r.findings] for r in note_identical(runs)]


def test_layers_that_did_not_move_are_noted() -> None:
    assert noted(run("a", "xyz"), run("b", "pyz")) == [[], [("identical-layer", 2), ("identical-layer", 3)]]


def test_a_layer_restored_from_elsewhere_names_where() -> None:
    _, later = note_identical([run("a", "xyz"), run("b", "pqy")])
    (finding,) = later.findings
    assert finding.layer == 3
    assert "layer 3 of b is, byte for byte, layer 2 of a" in finding.message


def test_its_own_number_comes_first_among_twins() -> None:
    _, later = note_identical([run("a", "xxz"), run("b", "pxq")])
    assert "layer 2 of b is, byte for byte, layer 2 of a" in later.findings[0].message


def test_identical_checkpoints_are_noted_once_as_a_whole() -> None:
    assert noted(run("a", "xyz"), run("b", "xyz")) == [[], [("identical-checkpoint", None)]]


def test_nothing_is_noted_where_everything_moved_or_the_checkpoint_is_the_same() -> None:
    assert noted(run("a", "xyz"), run("b", "pqr")) == [[], []]
    assert noted(run("a", "xyz"), run("a", "xyz")) == [[], []]  # two fits of one checkpoint, side by side


def test_the_newest_earlier_run_is_named() -> None:
    *_, last = note_identical([run("a", "xyz"), run("b", "xqr"), run("c", "xst")])
    assert "layer 1 of b" in last.findings[0].message
