"""The text of `peel audit --dry-run`."""

from __future__ import annotations

from peelcli.records.estimate import Estimate
from peelcli.records.printable import printable


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def render_estimate(plan: Estimate) -> str:
    """The plan as text, one line a resource."""
    minutes, seconds = divmod(round(plan.seconds), 60)
    free_memory = "unknown" if plan.free_memory is None else _size(plan.free_memory)
    return "\n".join(
        [
            f"plan for {printable(str(plan.checkpoint))} (nothing is run)",
            f"  layers  {len(plan.layers)} of {plan.num_layers}, on {plan.tokens:,} tokens",
            f"  read    {_size(plan.read_nbytes)} of weights, once to scan and once a stage",
            f"  memory  {_size(plan.memory_nbytes)} at most; {free_memory} free",
            f"  disk    {_size(plan.disk_nbytes)} at most; {_size(plan.free_disk)} free",
            f"  time    about {minutes} min {seconds:02d} s on this machine's processors",
            "  fits"
            if plan.fits
            else "  DOES NOT FIT: lower --tokens or --layers, or go elsewhere with --output",
        ]
    )
