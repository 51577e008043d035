"""How weights are quantised: one frozen value from the configuration to the attributes in HDF5."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantSpec:
    """A scheme by name, which weights share a scale, how that scale is chosen, and whether there are zero points.

    A group size makes the granularity `group`, whatever was given.
    """

    scheme: str
    group_size: int | None = None
    granularity: str = "channel"  # what shares a scale: "tensor", "channel" or "group"
    scale: str = "mse"  # the rule for the first scale: "absmean", "absmax" or "mse"
    symmetric: bool = True  # False: integers alone, with a zero point beside each scale

    def __post_init__(self) -> None:
        """Give weights in groups their granularity."""
        if self.group_size is not None:
            object.__setattr__(self, "granularity", "group")

    @property
    def grid(self) -> tuple[str, int | None]:
        """The scheme and the group size alone, as an activation file keeps what the checkpoint's weights lie on."""
        return (self.scheme, self.group_size)

    def group_width(self, d_in: int) -> int:
        """How many weights of a channel of `d_in` share a scale at most."""
        return d_in if self.group_size is None else min(self.group_size, d_in)

    @property
    def is_per_tensor(self) -> bool:
        """True where one scale serves the whole matrix."""
        return self.granularity == "tensor"
