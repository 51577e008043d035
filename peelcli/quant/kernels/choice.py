"""Which version of a hot function serves a call: decided call by call, by where its tensors are, never at import."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

CHOICES = ("auto", "eager")
_chosen = "auto"


def use(name: str) -> None:
    """From now on take kernels where they serve (auto), or never (eager). ValueError for another name."""
    global _chosen
    if name not in CHOICES:
        raise ValueError(f"kernels: expected one of {', '.join(CHOICES)}, found {name!r}")
    _chosen = name


def triton_serves(*tensors: Tensor | None, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> bool:
    """Whether a Triton kernel can take these tensors: all on one CUDA device, of `dtypes`, and Triton is there.

    All else goes the eager way, which takes any.
    """
    found = [tensor for tensor in tensors if tensor is not None]
    if _chosen == "eager" or not all(tensor.is_cuda for tensor in found):
        return False
    if any(str(tensor.dtype).removeprefix("torch.") not in dtypes for tensor in found):
        return False
    return len({tensor.device for tensor in found}) == 1 and find_spec("triton") is not None
