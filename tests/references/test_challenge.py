"""Laws of the challenge: never worse than the trained layer on `select`, and in the layer's own class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peelcli.quant.fake_quantize import fake_quantize
from peelcli.quant.initial_scale import initial_scale
from peelcli.records.quant_spec import QuantSpec
from peelcli.references.challenge import fit_challenge
from peelcli.references.interface import Batch, Budget, LinearMap

SHIFT = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


class Noise:
    """Inputs (n, 4, 6); the loss below wants them mapped by SHIFT."""

    def __init__(self, seed: int) -> None:
        self.inputs = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, rows: Sequence[int]) -> Batch:
        chosen = self.inputs[list(rows)]
        return Batch(torch.zeros(len(chosen), 4, dtype=torch.long), chosen, chosen)


def loss(weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
    return (batch.inputs @ weights["w"].T + weights["b"] - batch.inputs @ SHIFT.T).square().mean()


def on_select(weights: Mapping[str, Tensor]) -> float:
    return float(loss(weights, Noise(2).batch(range(8))))


def test_gains_where_there_is_something_to_gain() -> None:
    trained = {
        "w": SHIFT + 0.3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(5)),
        "b": torch.ones(6),
    }
    replacement, outcome = fit_challenge(
        loss, trained, [], {}, Noise(1), Noise(2), Budget(80, 0.05, 4, 0, "warm")
    )
    assert on_select(replacement.weights(trained["w"])) < 0.5 * on_select(trained)
    assert outcome.start == "trained"


def test_driven_too_hard_it_keeps_the_trained_weights() -> None:
    trained = {"w": SHIFT.clone(), "b": torch.zeros(6)}
    replacement, _ = fit_challenge(loss, trained, [], {}, Noise(1), Noise(2), Budget(12, 50.0, 4, 0, "warm"))
    assert torch.equal(replacement.plain["w"], trained["w"])
    assert torch.equal(replacement.plain["b"], trained["b"])


def test_a_layer_on_a_grid_stays_on_it() -> None:
    spec = QuantSpec("ternary")
    weight = fake_quantize(SHIFT, initial_scale(SHIFT, spec), spec)
    trained = {"w": weight, "b": torch.ones(6)}
    maps = [LinearMap("w", weight, False)]
    replacement, _ = fit_challenge(
        loss, trained, maps, {"w": spec}, Noise(1), Noise(2), Budget(60, 0.02, 4, 0, "warm")
    )
    fitted = replacement.weights(weight)
    assert on_select(fitted) < on_select(trained)
    for row in fitted["w"]:
        assert len(row.abs().unique()) <= 2  # 0 and one step


def test_a_matrix_on_a_grid_of_another_kind_stays_as_it_is() -> None:
    trained = {"w": SHIFT.round(), "b": torch.ones(6)}
    maps = [LinearMap("w", trained["w"], False)]
    in_place = lambda weights, batch: loss(trained | weights, batch)  # noqa: E731  # as a block has its own weights
    replacement, _ = fit_challenge(
        in_place, trained, maps, {"w": None}, Noise(1), Noise(2), Budget(60, 0.05, 4, 0, "warm")
    )
    assert not replacement.quantized
    assert set(replacement.plain) == {"b"}
    assert on_select(trained | replacement.plain) < on_select(trained)


def test_in_half_precision_small_steps_add_up() -> None:
    trained = {
        "w": (SHIFT + 0.1).bfloat16(),
        "b": torch.ones(6).bfloat16(),
    }  # a step is a tenth of a last bit
    replacement, _ = fit_challenge(
        loss_in_half, trained, [], {}, Noise(1), Noise(2), Budget(400, 0.0005, 4, 0, "warm")
    )
    fitted = replacement.weights(trained["w"])
    assert fitted["w"].dtype == torch.bfloat16
    assert on_select({k: v.float() for k, v in fitted.items()}) < 0.8 * on_select(
        {k: v.float() for k, v in trained.items()}
    )


def loss_in_half(weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
    assert all(w.dtype == torch.bfloat16 for w in weights.values())
    return loss({k: v.float() for k, v in weights.items()}, batch)
