"""Open an entry of the Hugging Face cache: a directory of snapshots, each a checkpoint made of links to blobs."""

from __future__ import annotations

from pathlib import Path

from peelcli.errors import CheckpointError

_LONGEST_REF = 256  # characters; a commit has 40


def snapshot_of(path: Path) -> Path:
    """The snapshot of a cache entry (`models--org--name`); any other path is returned unchanged.

    The snapshot is the one that refs/main names, or the only one. Raises CheckpointError if there is neither.
    """
    snapshots = path / "snapshots"
    if (path / "config.json").exists() or not snapshots.is_dir():
        return path
    found = sorted(child for child in snapshots.iterdir() if child.is_dir())
    main = _ref(path / "refs" / "main")
    named = [child for child in found if child.name == main]
    if named or len(found) == 1:
        return (named or found)[0]
    names = ", ".join(child.name for child in found[:5]) or "none"
    wanted = f"refs/main names {main!r}, which is not among them" if main else "it has no refs/main"
    raise CheckpointError(
        f"{path}: is an entry of the Hugging Face cache with {len(found)} snapshots ({names}), and {wanted}; name one "
        f"of the directories in {snapshots}, or download the model again"
    )


def _ref(file: Path) -> str:
    """The commit that a ref file names; "" if the file does not exist."""
    if not file.is_file():
        return ""
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(_LONGEST_REF).strip()
