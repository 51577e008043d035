"""Each kernel equals its eager twin: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from peelcli.errors import ArtefactError
from peelcli.quant.fake_quantize import eager_fake_quantize, fake_quantize
from peelcli.quant.initial_scale import initial_scale
from peelcli.quant.kernels import choice, eager
from peelcli.quant.schemes import SCHEMES

pytest.importorskip("triton", reason="needs Triton, which the test extra brings on Linux x86-64")
from peelcli.quant.kernels import triton_descent, triton_fake_quantize  # noqa: E402
from peelcli.records.quant_spec import QuantSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW_BIT = [name for name, scheme in SCHEMES.items() if scheme.levels]
CODEBOOK = (-1.0, -0.7, -0.35, -0.1, 0.0, 0.2, 0.45, 1.0)
RAGGED = [((3, 37), None), ((5, 20), 8), ((2, 3, 16), 16), ((1, 1), None)]


def levels_of(name: str) -> tuple[float, ...]:
    return CODEBOOK if name == "codebook" else tuple(map(float, SCHEMES[name].levels))


def problem(
    d_out: int, d_in: int, size: int | None, levels: tuple[float, ...], zeros: bool, seed: int
) -> dict[str, Tensor | None]:
    """A weight to descend from, with a dead input, a row without a step, and columns in any order."""
    g = torch.Generator().manual_seed(seed)
    table = torch.tensor(levels)
    x = torch.randn(3 * d_in, d_in, generator=g) @ (
        torch.eye(d_in) + 0.3 * torch.rand(d_in, d_in, generator=g)
    )
    hessian = x.T @ x / len(x)
    hessian[d_in // 2] = hessian[:, d_in // 2] = 0
    group_of = torch.arange(d_in) // (size or d_in)
    num_groups = int(group_of.max()) + 1
    scale = 0.1 + 0.3 * torch.rand(d_out, num_groups, generator=g)
    scale[0, 0] = 0
    found = {
        "codes": table[torch.randint(len(table), (d_out, d_in), generator=g)],
        "scale": scale,
        "zero_point": torch.randn(d_out, num_groups, generator=g) if zeros else None,
        "target": torch.randn(d_out, d_in, generator=g),
        "hessian": hessian,
        "levels": table,
        "group_of": group_of[torch.randperm(d_in, generator=g)],
    }
    return {key: None if value is None else value.to(DEVICE) for key, value in found.items()}


def loss(made: dict[str, Tensor | None], codes: Tensor) -> Tensor:
    weight = eager.weight_of(codes, made["scale"], made["zero_point"], made["group_of"])  # type: ignore[arg-type]
    error = (weight - made["target"]).double()
    return ((error @ made["hessian"].double()) * error).sum(-1)  # type: ignore[union-attr]


def descended(version: ModuleType, made: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and gradient after a sweep, and how many codes of each row it changed."""
    names = ("codes", "scale", "zero_point", "target", "hessian", "group_of")
    codes, gradient = made["codes"].clone(), eager.gradient_of(*(made[name] for name in names))  # type: ignore[arg-type, union-attr]
    rest = (made[name] for name in ("hessian", "levels", "group_of"))
    return codes, gradient, version.coordinate_descent_(codes, made["scale"], gradient, *rest)


@pytest.mark.parametrize("name", [*LOW_BIT, "codebook"])
@pytest.mark.parametrize(("d_out", "d_in", "size", "zeros"), [(3, 11, None, False), (6, 9, 4, True)])
def test_descent(
    name: str, d_out: int, d_in: int, size: int | None, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (
        DEVICE == "cpu"
    ):  # the interpreter takes a millisecond an operation: small blocks, so that there are several
        monkeypatch.setattr(triton_descent, "ROWS", 4)
        for version in (eager, triton_descent):
            monkeypatch.setattr(version, "BLOCK", 4)
    made = problem(d_out, d_in, size, levels_of(name), zeros, seed=d_in)
    expected, gradient, changed = descended(eager, made)
    found, kept, by_kernel = descended(triton_descent, made)
    if DEVICE == "cpu":
        assert torch.equal(found, expected)
        assert torch.equal(by_kernel, changed)
        torch.testing.assert_close(kept, gradient, rtol=1e-4, atol=1e-4)
    # On a GPU a last bit of a sum may send a code the other way, to a weight that is as good.
    before, after = loss(made, made["codes"]), loss(made, found)  # type: ignore[arg-type]
    assert bool((after <= before * (1 + 1e-5)).all())
    torch.testing.assert_close(after, loss(made, expected), rtol=2e-2, atol=1e-4)
    assert int(changed.sum()) > d_out


@pytest.mark.parametrize("name", [*LOW_BIT, "codebook"])
@pytest.mark.parametrize(("d_out", "d_in", "size", "zeros"), [(3, 11, None, False), (6, 9, 4, True)])
def test_rounding_with_feedback(
    name: str, d_out: int, d_in: int, size: int | None, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_descent, "ROWS", 4)
        for version in (eager, triton_descent):
            monkeypatch.setattr(version, "BLOCK", 4)
    made = problem(d_out, d_in, size, levels_of(name), zeros, seed=d_in)
    made["hessian"] = made["hessian"] + 0.1 * torch.eye(d_in, device=DEVICE)  # type: ignore[operator]
    made["factor"] = eager.upper_factor(made["hessian"])
    names = ("scale", "zero_point", "target", "factor", "levels", "group_of")
    expected, found = (
        version.round_with_feedback(*(made[name] for name in names))  # type: ignore[arg-type]
        for version in (eager, triton_descent)
    )
    assert bool(torch.isin(found, made["levels"]).all())  # type: ignore[arg-type]
    if DEVICE == "cpu":
        assert torch.equal(found, expected)
    torch.testing.assert_close(loss(made, found), loss(made, expected), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "size"), RAGGED)
@pytest.mark.parametrize("name", LOW_BIT)
def test_fake_quantisation_and_its_gradients(
    name: str, shape: tuple[int, ...], size: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(len(shape))
    scheme = SCHEMES[name]
    weight = torch.randn(shape).to(DEVICE, dtype)
    scale = 0.8 * initial_scale(
        weight.float(), QuantSpec(scheme.name, size)
    )  # so that some weights are clipped
    if scale.numel() > 1:
        scale.view(-1)[0] = 0
    above = torch.randn(shape).to(DEVICE, dtype)
    results = []
    for function in (
        lambda w, s: eager_fake_quantize(w, s, QuantSpec(scheme.name, size)),
        lambda w, s: triton_fake_quantize.fake_quantize(w, s, scheme.levels, scheme.reach, size),
    ):
        w, s = weight.clone().requires_grad_(), scale.clone().requires_grad_()
        out = function(w, s)
        out.backward(above)
        results.append((out.detach(), w.grad, s.grad))
    # The interpreter cuts float32 off to bfloat16 where a GPU rounds: up to one step of bfloat16.
    exact = {"rtol": 0.0, "atol": 0.0} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 0.0}
    torch.testing.assert_close(results[1][0], results[0][0], **exact)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0.0, atol=0.0)
    torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_a_channel_longer_than_a_piece_and_what_is_not_a_number(name: str) -> None:
    scheme = SCHEMES[name]
    weight = torch.randn(1, triton_fake_quantize.PIECE + 5).to(DEVICE)
    weight[0, 7], weight[0, 9] = torch.nan, 1e30
    scale = torch.full((1, 1), 0.3, device=DEVICE)
    expected = eager_fake_quantize(weight, scale, QuantSpec(scheme.name))
    found = triton_fake_quantize.fake_quantize(weight, scale, scheme.levels, scheme.reach)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert bool(found[0, 7].isnan())


@pytest.fixture
def _auto() -> object:
    yield choice.use("auto")
    choice.use("auto")


@pytest.mark.usefixtures("_auto")
def test_what_is_chosen_follows_the_tensors_and_can_be_turned_off() -> None:
    here, on_cpu = torch.ones(2, 2, device=DEVICE), torch.ones(2, 2)
    assert choice.triton_serves(here) == (DEVICE == "cuda")
    assert not choice.triton_serves(here, on_cpu)
    assert not choice.triton_serves(here.double())
    choice.use("eager")
    assert not choice.triton_serves(here)
    with pytest.raises(ValueError, match="auto, eager"):
        choice.use("triton")


def test_dispatch_hands_a_call_to_the_kernel_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the choice alone is forced, and the kernel runs wherever the tests do."""
    from peelcli.quant import fake_quantize as quantiser
    from peelcli.quant.kernels import descent

    for room in (descent, quantiser):
        monkeypatch.setattr(room, "triton_serves", lambda *tensors, **rest: True)
    scheme, weight = SCHEMES["ternary"], torch.randn(3, 10).to(DEVICE)
    scale = initial_scale(weight, QuantSpec(scheme.name, 5))
    assert torch.equal(
        fake_quantize(weight, scale, QuantSpec(scheme.name, 5)),
        eager_fake_quantize(weight, scale, QuantSpec(scheme.name, 5)),
    )
    with pytest.raises(ArtefactError, match="scale: expected"):
        fake_quantize(weight, scale, QuantSpec(scheme.name, 4))
    slopes = []
    for function in (fake_quantize, eager_fake_quantize):  # one step for the whole matrix
        step = scale[:1, :1].clone().requires_grad_()
        out = function(weight, step, QuantSpec(scheme.name))
        assert torch.equal(out, eager_fake_quantize(weight, step, QuantSpec(scheme.name)))
        (out * weight).sum().backward()
        slopes.append(step.grad)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)
    made = problem(2, 6, None, levels_of("int2"), False, 0)
    assert torch.equal(descended(descent, made)[0], descended(eager, made)[0])
