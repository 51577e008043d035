"""Find the quantised linear maps of an opened model, inside and outside its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from peelcli.checkpoint.running import Running, round_inputs
from peelcli.checkpoint.weights import BlockWeights
from peelcli.errors import CheckpointError
from peelcli.records import QuantizedModule


class QuantizedWeights:
    """Rounds latent weights and the inputs of quantised linear maps, and records how each map is quantised."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        weights: BlockWeights,
        running: Running,
        unpacked: Mapping[str, QuantizedModule],
    ) -> None:
        """unpacked: how the packed weights were quantised, by the module's name in the files.

        Raises CheckpointError if the user's globs match no linear map.
        """
        self._weights, self._unpacked = weights, unpacked
        self._beside: dict[str, QuantizedModule] = {}
        self._by_layer = {
            (module.layer, name.split(f".{module.layer - 1}.", 1)[-1]): module
            for name, module in unpacked.items()
            if module.layer is not None
        }
        chosen = 0
        for layer, block in enumerate(blocks, start=1):
            for name, module in block.named_modules():
                if self._is_quantized(layer, name):
                    chosen += 1
                    if running.activation is not None:
                        round_inputs(module, running.activation)
        chosen += self._outside(model, weights.list_name, running)
        if running.latent is not None and not chosen:
            raise CheckpointError(
                "no linear map of the model is one that the trained scheme names: its globs are matched against full "
                f"names such as {weights.module_name(1, next(iter(weights.matrices(1)), ''))!r}. Correct them."
            )

    def _is_quantized(self, layer: int, module: str) -> bool:
        matrix = f"{module}.weight"
        return (layer, module) in self._by_layer or self._weights.is_rounded(layer, matrix)

    def _outside(self, model: nn.Module, blocks: str, running: Running) -> int:
        """Quantise the linear maps outside the blocks, such as the head; returns how many there are."""
        count = 0
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or name.startswith(f"{blocks}."):
                continue
            latent = running.latent is not None and running.latent.selects(name, False)
            if not latent and name not in self._unpacked:
                continue
            count += 1
            if running.latent is not None:
                value, self._beside[name] = running.latent.rounded(name, None, module.weight.data)
                # A new parameter, so that an embedding tied to the head is not rounded too.
                module.weight = nn.Parameter(value.to(module.weight.dtype), requires_grad=False)
            if running.activation is not None:
                round_inputs(module, running.activation)
        return count

    def of_layer(self, layer: int) -> dict[str, QuantizedModule]:
        """How the matrices of one layer are quantised, by parameter name within the block."""
        found = {f"{name}.weight": module for (n, name), module in self._by_layer.items() if n == layer}
        for matrix in self._weights.matrices(layer):
            module = self._weights.rounded.get(self._weights.module_name(layer, matrix))
            if module is not None:
                found[matrix] = module
        return found

    def everything(self) -> tuple[QuantizedModule, ...]:
        """How every quantised map is quantised: in the order of the files or blocks, those outside the blocks last."""
        rounded = sorted(self._weights.rounded.values(), key=lambda m: m.layer or 0)
        return (*self._unpacked.values(), *rounded, *self._beside.values())
