"""Rows of a low-bit weight on their way down: codes and scales, and the gradient that belongs to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peelcli.quant.kernels.descent import coordinate_descent_
from peelcli.quant.kernels.eager import rescale_, spread


class Rows(NamedTuple):
    """Rows that may lie anywhere; shapes and loss as in `kernels.eager`. Descent changes all but zero points and pull.

    gradient: (w − t) H. pull: t H, of rows with one scale each. Both (d_out, d_in), kept because a product with H costs
    more than all else.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    gradient: Tensor
    pull: Tensor | None

    def shifted(self, group_of: Tensor) -> Tensor:
        """Codes less their zero points, which are not to move when the scales do."""
        return self.codes if self.zero_point is None else self.codes - spread(self.zero_point, group_of)

    def descend_(self, hessian: Tensor, levels: Tensor, group_of: Tensor, sweeps: int, together: int) -> None:
        """Scales and codes in turn until no code changes; rows that have come to rest are left out.

        together: how many neighbours share one scale, and come to rest together.
        """
        active, some = torch.arange(len(self.codes), device=hessian.device), self
        for _ in range(sweeps):
            some.rescale_(hessian, group_of, together)
            changed = coordinate_descent_(some.codes, some.scale, some.gradient, hessian, levels, group_of)
            if some is not self:
                self.codes[active], self.scale[active] = some.codes, some.scale
                self.gradient[active] = some.gradient
            going = changed.view(-1, together).sum(1).repeat_interleave(together) > 0
            if not going.all():
                active = active[going]
                some = Rows(*(None if v is None else v[active] for v in self))  # type: ignore[arg-type]
            if len(active) == 0:
                break
        self.rescale_(hessian, group_of, together)

    def rescale_(self, hessian: Tensor, group_of: Tensor, together: int) -> None:
        """Each scale to the value that costs least while all else stays; with several to a row, in turn."""
        if self.pull is None:
            rescale_(self.shifted(group_of), self.scale, None, self.gradient, hessian, group_of)
            return
        # Of w = scale · c with one scale, c H is known without a product: w H is gradient + pull.
        codes, scale = self.shifted(group_of), self.scale
        change = (self.gradient + self.pull).mul_(torch.where(scale == 0, 0.0, scale.reciprocal()))
        energy = (change * codes).sum(-1).view(-1, together).sum(1)
        match = (self.pull * codes).sum(-1).view(-1, together).sum(1)
        best = match / energy.clamp_min(torch.finfo(energy.dtype).tiny)
        best = torch.where(energy > 0, best.to(scale), scale[::together, 0])
        scale.copy_(best.repeat_interleave(together).unsqueeze(-1))
        torch.addcmul(-self.pull, change, scale, out=self.gradient)
