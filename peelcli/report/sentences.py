"""What a verdict says, in sentences: the rules that hold, with their figures, as a user reads them."""

from __future__ import annotations

from peelcli.records import Bound, Bounds, NetworkVerdict


def network_notes(network: NetworkVerdict) -> list[str]:
    """All that is said of the network as a whole."""
    bounds = network.bounds
    if bounds is None:
        return list(network.notes)
    return [*network.notes, *(_PATH_NOTES[rule](bounds) for rule in network.path_rules)]


def _unconverged(bounds: Bounds) -> str:
    low, high = bounds.head_interval
    return (
        f"The network has not converged: its own blocks under a refitted head have a loss {bounds.head_gap:.4f} "
        f"nats lower ({low:+.4f} to {high:+.4f}), and the text explains {bounds.head_allowance:.4f} of it at most. "
        "A flat loss curve then says that the learning rate is too small or has been lowered too early: raise it "
        "and train on."
    )


def _red(bounds: Bounds) -> str:
    assert bounds.last is not None
    return (
        f"Red zone: blocks that were each fitted to the network's last states alone ({_reach(bounds.last)}. "
        "Training has been ineffective: check the learning rate, the data order and that the weights were loaded; "
        "then train."
    )


def _yellow(bounds: Bounds) -> str:
    return (
        f"Yellow zone: blocks fitted one by one along a map ({_reach(bounds.yes)}: a better network of the same "
        "class is at hand. Train on, or look at the layers that the map bypasses."
    )


_PATH_NOTES = {"unconverged": _unconverged, "red": _red, "yellow": _yellow}


def _reach(bound: Bound) -> str:
    low, high = bound.gap_interval
    return (
        f"{list(bound.target_map)}) reach a loss of {bound.ce:.4f}, {bound.gap:.4f} nats ({low:+.4f} to {high:+.4f}) "
        "below what the trained blocks do, a refitted head granted to both"
    )
