"""The errors that peel raises on purpose, one kind per exit code.

Every message names the thing, says what was expected and what was found, and ends with what to do.
"""

from __future__ import annotations


class PeelError(Exception):
    """Base of everything that peel raises on purpose; `exit_code` is what the process ends with.

    Its arguments are the lines of the message, nearly always one. A line may hold names from files: it is escaped
    where it is printed, and a newline within it does not begin another line.
    """

    exit_code = 3

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """The message, line by line."""
        return tuple(map(str, self.args))


class UsageError(PeelError):
    """The command line or the configuration is wrong (exit code 2)."""

    exit_code = 2


class CheckpointError(PeelError):
    """The checkpoint cannot be opened: missing, incomplete, unsupported or damaged (exit code 3)."""


class CheckpointChangedError(CheckpointError):
    """Files of the checkpoint are no longer those that were looked at first (exit code 3)."""

    def __init__(self, directory: object, changed: str) -> None:
        """Name the directory, and what in it has changed."""
        self.directory = directory
        super().__init__(
            f"{directory}: {changed} changed or removed while it was audited. Nothing of it is kept. Audit the "
            "checkpoint again once nothing writes to it, or audit a copy."
        )


class CalibrationError(PeelError):
    """The calibration text cannot be used: missing, too short, or not for this vocabulary (exit code 3)."""


class ArtefactError(PeelError):
    """An HDF5 file of peel's cannot be used: truncated, of another checkpoint, or of a newer schema (exit code 3)."""


class BusyError(ArtefactError):
    """Another process works on the same file, and this one is not to wait for it (exit code 3)."""


class ResourceError(PeelError):
    """The machine does not suffice: disk or memory (exit code 3)."""


class ReplayError(PeelError):
    """A witness did not reproduce the gap that was reported for it (exit code 1: the claim failed, not the tool)."""

    exit_code = 1
