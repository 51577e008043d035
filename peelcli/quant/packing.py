"""Codes at their true size: what a reference costs on disk is what its scheme says.

Codes are written in row-major order, without padding between rows. `ternary` puts 5 codes into a byte (3⁵ =
243 of its 256 values), the first in the lowest digit; all others write `num_bits` bits per code, counted
from the lowest one, lowest bit first, so that 8 codes of int3 fill 3 bytes. Only the last byte may hold unused room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peelcli.errors import ArtefactError, UsageError
from peelcli.quant.schemes import Scheme

_TRITS = 5
_CHUNK = 2**20  # codes at a time, a multiple of 8: the bits of a chunk take up to 8 times its room


def packed_nbytes(numel: int, scheme: Scheme) -> int:
    """Bytes that `numel` codes take; UsageError for `fp`, which has no codes."""
    _require_codes(scheme)
    if scheme.name == "ternary":
        return -(-numel // _TRITS)
    return -(-numel * int(scheme.num_bits) // 8)


def pack(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes (int8, any shape) → bytes (packed_nbytes,), uint8, on the same device.

    UsageError for `fp` and for codes that the scheme does not have.
    """
    _require_codes(scheme)
    flat = codes.reshape(-1)
    _check_codes(flat, scheme)
    if scheme.name == "ternary":
        return _pack_trits(flat)
    digits = (flat > 0) if scheme.name == "binary" else (flat.to(torch.int16) - scheme.qmin)
    digits = digits.to(torch.uint8)  # (numel,), 0 … 2^num_bits − 1
    num_bits = int(scheme.num_bits)
    parts = [_join_bits(part, num_bits) for part in digits.split(_CHUNK)]
    return torch.cat(parts)


def unpack(packed: Tensor, scheme: Scheme, shape: Sequence[int]) -> Tensor:
    """Bytes from `pack` → codes (int8) of `shape`, on the same device.

    ArtefactError where the bytes are not those of so many codes of the scheme, UsageError for `fp`.
    """
    numel = math.prod(shape)
    expected = packed_nbytes(numel, scheme)
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.shape[0] != expected:
        raise ArtefactError(
            f"packed {scheme.name} codes: expected uint8 ({expected},) for shape {tuple(shape)}, "
            f"found {tuple(packed.shape)} of {packed.dtype}; the file is damaged, fit again"
        )
    if scheme.name == "ternary":
        return _unpack_trits(packed, numel).reshape(shape)
    num_bits = int(scheme.num_bits)
    parts = [_split_bits(part, num_bits) for part in packed.split(_CHUNK // 8 * num_bits)]
    digits = torch.cat(parts)[:numel].to(torch.int16)
    if numel and int(digits.max()) >= len(scheme.levels):
        raise ArtefactError(
            f"packed {scheme.name} codes: expected digits below {len(scheme.levels)}, found {int(digits.max())}; "
            "the file is damaged, fit again"
        )
    codes = digits * 2 - 1 if scheme.name == "binary" else digits + scheme.qmin
    return codes.to(torch.int8).reshape(shape)


def _require_codes(scheme: Scheme) -> None:
    if scheme.is_free:
        raise UsageError(
            f"packing: expected a scheme with codes, found {scheme.name}; store its weights in their dtype"
        )


def _check_codes(flat: Tensor, scheme: Scheme) -> None:
    if flat.numel() == 0:
        return
    low, high = int(flat.min()), int(flat.max())
    if low < scheme.qmin or high > scheme.qmax or (scheme.name == "binary" and bool((flat == 0).any())):
        levels = "−1 and 1" if scheme.name == "binary" else f"{scheme.qmin} to {scheme.qmax}"
        found = "a 0" if scheme.qmin <= low and high <= scheme.qmax else f"{low} to {high}"
        raise UsageError(
            f"codes to pack as {scheme.name}: expected {levels}, found {found}; "
            "quantise with the scheme that packs"
        )


def _join_bits(digits: Tensor, num_bits: int) -> Tensor:
    places = torch.arange(num_bits, dtype=torch.uint8, device=digits.device)
    bits = ((digits.unsqueeze(-1) >> places) & 1).reshape(-1)  # (n · num_bits,)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[0] % 8)).reshape(-1, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=digits.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def _split_bits(packed: Tensor, num_bits: int) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = ((packed.unsqueeze(-1) >> places) & 1).reshape(-1)
    bits = bits[: bits.shape[0] // num_bits * num_bits].reshape(-1, num_bits)
    weights = 1 << torch.arange(num_bits, dtype=torch.uint8, device=packed.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def _powers(device: torch.device) -> Tensor:
    return 3 ** torch.arange(_TRITS, dtype=torch.int16, device=device)


def _pack_trits(flat: Tensor) -> Tensor:
    digits = (flat + 1).to(torch.int16)
    digits = torch.nn.functional.pad(digits, (0, -digits.shape[0] % _TRITS)).reshape(-1, _TRITS)
    return (digits * _powers(flat.device)).sum(-1).to(torch.uint8)


def _unpack_trits(packed: Tensor, numel: int) -> Tensor:
    if numel and int(packed.max()) >= 3**_TRITS:
        raise ArtefactError(
            f"packed ternary codes: expected bytes below {3**_TRITS}, found {int(packed.max())}; "
            "the file is damaged, fit again"
        )
    digits = packed.to(torch.int16).unsqueeze(-1) // _powers(packed.device) % 3  # (nbytes, 5)
    return (digits.reshape(-1)[:numel] - 1).to(torch.int8)
