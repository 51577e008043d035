"""Verdicts: records in, verdicts out. Plain numbers and numpy; no torch, no HDF5."""

from peelcli.verdict.comparison import is_alike, with_comparisons
from peelcli.verdict.duplicates import note_identical
from peelcli.verdict.health import blocks_do_harm, data_fit, does_better_than
from peelcli.verdict.judge import judge
from peelcli.verdict.policy import Policy
from peelcli.verdict.screening import SCREENED, screened_under, settled
from peelcli.verdict.zones import with_running_minimum

__all__ = [
    "SCREENED",
    "Policy",
    "blocks_do_harm",
    "data_fit",
    "does_better_than",
    "is_alike",
    "judge",
    "note_identical",
    "screened_under",
    "settled",
    "with_comparisons",
    "with_running_minimum",
]
