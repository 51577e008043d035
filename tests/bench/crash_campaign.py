"""Crash an audit in every way it must survive, and count how often it came out as the undisturbed one.

    python tests/bench/crash_campaign.py [pairs] [changes] [kills] [cuts] [damage]

Without arguments all of them run: five pairs of audits at once from the start and five from the middle; the weights
overwritten, truncated, replaced and deleted at ten moments each; kill -9 at 25 moments; power cuts at 20 moments;
damaged leftovers of five interruptions in four ways. It needs a tiny checkpoint alone, which it makes.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "cli")]

from crashes import CHANGES, Disk, Interrupted, Place, at_once, damage_all, kept  # noqa: E402
from tiny import Blow, peel_apart  # noqa: E402

MIDDLES = ("extract 2/5", "fit 1/3", "rescale 0/1", "score 1/4", "paths 2/")
DAMAGE = ("flipped", "truncated", "garbage", "empty")


def pairs(place: Place, base: Path) -> Iterator[tuple[str, bool]]:
    """Two audits at once: from the start, and from where a killed one stopped."""
    for number, middle in enumerate((None,) * 5 + MIDDLES):
        work = base / f"pair-{number}"
        if middle is not None:
            peel_apart(base / "struck", *place.command("-o", work), blow=Blow(middle, signal.SIGKILL))
        both = at_once(place, work)
        yield f"pair from {middle or 'the start'}", all(map(place.is_as_expected, both))


def changes(place: Place, base: Path) -> Iterator[tuple[str, bool]]:
    """The weights change at ten moments in each way; then the good file is back."""
    with pytest.MonkeyPatch.context() as patch:
        total = Interrupted(patch, -1, lambda: None)
        place.audit(base / "counted")
    for change in CHANGES:
        for moment in range(10):
            work = base / f"{change.__name__}-{moment}"
            with pytest.MonkeyPatch.context() as patch:
                at = total.calls * moment // 10
                Interrupted(patch, at, lambda change=change: change(place))  # type: ignore[misc]
                done = place.audit(base / "home", "-o", work)
            refused = done.code == 3 and "changed or removed" in done.err and not kept(work)
            place.put_back()
            good = place.is_as_expected(place.audit(base / "home", "-o", work))
            shutil.rmtree(work)
            yield f"{change.__name__} at read {at}", refused and good


def kills(place: Place, base: Path) -> Iterator[tuple[str, bool]]:
    """kill -9 at 25 moments: a line of progress, and some time after it."""
    rng = random.Random(0)
    for number in range(25):
        work, line = base / f"kill-{number}", rng.choice(MIDDLES)
        blow = Blow(line, signal.SIGKILL, rng.choice((0.0, rng.uniform(0.001, 0.3))))
        struck = peel_apart(base / "home", *place.command("-o", work), blow=blow)
        same = place.is_as_expected(place.audit(base / "home", "-o", work))
        left = [p for p in work.rglob("*") if ".part" in p.name or p.suffix in (".lock", ".journal")]
        name = f"kill -9 {blow.delay:.3f} s after {line!r}"
        yield name + (" (too late)" if struck.code != -signal.SIGKILL else ""), same and not left


def cuts(place: Place, base: Path) -> Iterator[tuple[str, bool]]:
    """A power cut after 20 of an audit's fsyncs: what was not synced is lost."""
    work = base / "cut"
    with pytest.MonkeyPatch.context() as patch, Disk(work).recording(patch) as disk:
        place.audit(base / "home", "-o", work)
    count = len(disk.cuts)
    for number in sorted({count * n // 20 for n in range(20)}):
        disk.after_cut(number, work)
        same = place.is_as_expected(place.audit(base / "home", "-o", work))
        yield f"power cut after fsync {number + 1} of {count}", same


def damage(place: Place, base: Path) -> Iterator[tuple[str, bool]]:
    """Every leftover of an interruption damaged."""
    rng = random.Random(0)
    for number, line in enumerate(MIDDLES):
        left = base / f"left-{number}"
        peel_apart(base / "home", *place.command("-o", left), blow=Blow(line, signal.SIGKILL))
        for how in DAMAGE:
            work = base / f"damaged-{number}-{how}"
            shutil.copytree(left, work)
            files = damage_all(work, how, rng)
            done = place.audit(base / "home", "-o", work)
            yield f"{files} leftovers of {line!r} {how}", place.is_as_expected(done)


def main() -> int:
    """Run what the arguments name, and print what failed and the counts."""
    parts = {part.__name__: part for part in (pairs, changes, kills, cuts, damage)}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder) / "place")
        for name in sys.argv[1:] or parts:
            began, good, total = time.monotonic(), 0, 0
            for what, held in parts[name](place, Path(folder)):
                good, total = good + held, total + 1
                if not held:
                    print(f"  failed: {what}", flush=True)
            failed += total - good
            print(f"{name}: {good} of {total} as undisturbed, {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
