"""One method of `solver_peers.py` on one model, in a process of its own: ASKED.json METHOD → a line of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from peelcli.quant.fake_quantize import dequantize, quantize
from peelcli.quant.initial_scale import initial_scale
from peelcli.quant.schemes import scheme_named
from peelcli.quant.solver import damped, solve
from peelcli.records.quant_spec import QuantSpec

HELD_OUT = 16  # sequences
# weight (d_out, d_in), Σ x xᵀ (d_in, d_in), bits, group size → weight
Method = Callable[[Tensor, Tensor, str, int | None], Tensor]


def scheme_of(bits: str) -> str:
    """The name of a scheme from the number of its bits."""
    return bits if bits == "ternary" else f"int{bits}"


def nearest(weight: Tensor, hessian: Tensor, bits: str, group: int | None) -> Tensor:
    """Round to nearest."""
    scheme = scheme_named(scheme_of(bits))
    scale = initial_scale(weight, QuantSpec(scheme.name, group))
    return dequantize(
        quantize(weight, scale, QuantSpec(scheme.name, group)), scale, QuantSpec(scheme.name, group)
    )


def solver(weight: Tensor, hessian: Tensor, bits: str, group: int | None, **how: object) -> Tensor:
    """The direct solver."""
    scheme = scheme_named(scheme_of(bits))
    return dequantize(
        *solve(weight, damped(hessian), QuantSpec(scheme.name, group), **how), QuantSpec(scheme.name, group)
    )  # type: ignore[arg-type]


def gptq(weight: Tensor, hessian: Tensor, bits: str, group: int | None, *, mse: bool = False) -> Tensor:
    """llm-compressor's function that quantises one weight."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    if bits == "ternary":
        raise ValueError("no ternary")
    if group is not None and weight.shape[1] % group:
        group = None
    kind = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    how = QuantizationArgs(num_bits=int(bits), symmetric=True, actorder="weight", **kind)
    groups = weight.reshape(len(weight), -1, group or weight.shape[1])
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), how)
    if mse:
        scale = initial_scale(weight, QuantSpec(f"int{bits}", group))
    found, _, _ = quantize_weight(
        weight.clone()[None], hessian.clone()[None], scale[None], zero[None], None, how
    )
    return found[0]


def hqq(weight: Tensor, hessian: Tensor, bits: str, group: int | None) -> Tensor:
    """HQQ, along the rows."""
    from hqq.core.quantize import Quantizer

    size = group if group and weight.shape[1] % group == 0 else weight.shape[1]
    nbits = 1.58 if bits == "ternary" else int(bits)
    packed, meta = Quantizer.quantize(
        weight, nbits=nbits, group_size=size, axis=1, device="cpu", compute_dtype=torch.float32, bitpack=False
    )
    return Quantizer.dequantize(packed, meta).reshape(weight.shape)


METHODS: dict[str, Method] = {
    "nearest": nearest,
    "solver": solver,
    "solver-0": lambda *a: solver(*a, starts=(1.0,), max_sweeps=0),
    "solver-1": lambda *a: solver(*a, starts=(1.0,)),
    "gptq": gptq,
    "gptq-mse": lambda *a: gptq(*a, mse=True),
    "hqq": hqq,
}


def build(asked: dict[str, object]) -> nn.Module:
    """The model that is quantised."""
    if asked["model"] == "stories":
        return transformers.AutoModelForCausalLM.from_pretrained(asked["stories"], dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=int(asked["blocks"]),  # type: ignore[call-overload]
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=512,
    )
    return transformers.LlamaForCausalLM(config).eval()


def linears(block: nn.Module, only: str) -> dict[str, nn.Linear]:
    """The linear maps of a block by name, those with `only` in it."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear) and only in name}


def watch(modules: Mapping[str, nn.Module], keep: Callable[[str, Tensor], None]) -> list[object]:
    """Hooks that hand what enters each module to `keep`, tokens in rows."""
    return [
        m.register_forward_pre_hook(lambda _, a, n=n: keep(n, a[0].detach().flatten(0, -2)))
        for n, m in modules.items()
    ]


def quantise(model: nn.Module, ids: Tensor, method: Method, bits: str, group: int | None, only: str) -> float:
    """Block after block, on the inputs that the quantised blocks before give; seconds of the method itself."""
    seconds = 0.0
    for block in model.model.layers:
        modules, hessians = linears(block, only), {}
        hooks = watch(modules, lambda n, x, h=hessians: h.__setitem__(n, h.get(n, 0.0) + x.T @ x))
        for batch in ids.split(8):
            model(batch)
        for hook in hooks:
            hook.remove()
        for name, module in modules.items():
            began = time.process_time()
            value = method(module.weight.data.clone(), hessians[name] / len(ids), bits, group)
            seconds += time.process_time() - began
            module.weight.data.copy_(value)
    return seconds


def autoround(
    model: nn.Module, ids: Tensor, bits: str, group: int | None, iters: int, tokenizer: object
) -> float:
    """AutoRound on the whole model. tokenizer: it asks for one, though it is given ids."""
    from auto_round import AutoRound

    if bits == "ternary":
        raise ValueError("no ternary")
    began = time.process_time()
    scheme = {"bits": int(bits), "group_size": group or -1, "sym": True, "data_type": "int"}
    batches = [{"input_ids": row[None]} for row in ids]
    AutoRound(
        model,
        scheme=scheme,
        tokenizer=tokenizer,
        dataset=batches,
        iters=iters,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        device_map="cpu",
    ).quantize()
    return time.process_time() - began


@torch.no_grad()
def measured(asked: dict[str, object], method: str, bits: str, group: int | None, rows: Tensor) -> str:
    """Error, CE and seconds of one method, or why it could not be."""
    fit, held_out = rows.split([len(rows) - HELD_OUT, HELD_OUT])
    model, trained, only = build(asked), build(asked), str(asked["only"])
    try:
        if method == "autoround":
            with torch.enable_grad():
                iters = int(asked["autoround_iters"])  # type: ignore[call-overload]
                tokenizer = transformers.AutoTokenizer.from_pretrained(asked["stories"])
                seconds = autoround(model, fit, bits, group, iters, tokenizer)
            model.float()  # it leaves bfloat16 behind
        else:
            seconds = quantise(model, fit, METHODS[method], bits, group, only)
    except Exception as error:  # noqa: BLE001  a peer that fails is a line of the table
        return f"{type(error).__name__}: {error}"[:80].replace("\n", " ")
    errors = []
    for old, new in zip(trained.model.layers, model.model.layers, strict=True):
        modules, found = linears(old, only), linears(new, only)
        tally = {name: torch.zeros(2) for name in modules}

        def keep(name: str, x: Tensor, o=modules, f=found, t=tally) -> None:
            before, after = (x @ m[name].weight.T for m in (o, f))
            t[name] += torch.stack([(after - before).square().sum(), before.square().sum()])

        hooks = watch(modules, keep)
        trained(held_out)
        for hook in hooks:
            hook.remove()
        errors += [float(t[0] / t[1]) for t in tally.values()]
    logits = model(held_out).logits[:, :-1]
    ce = float(nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()))
    return f"{sum(errors) / len(errors):.5f}, {ce:.3f}, {seconds:.1f}"


def main() -> None:
    """Quantise, measure, print."""
    torch.set_num_threads(1)
    asked, method = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked["stories"])
    text = Path(asked["stories"]).with_name("tinystories.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    rows = ids[: 256 * (asked["tokens"] // 256 + HELD_OUT)].view(-1, 256)
    print(
        json.dumps(
            [
                measured(asked, method, bits, None if group == "channel" else int(group), rows)
                for bits in asked["bits"]
                for group in asked["groups"]
            ]
        )
    )


if __name__ == "__main__":
    main()
