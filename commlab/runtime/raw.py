"""Tensors as plain bytes, whatever their dtype means: what is given, compared and restored bit for bit.

bool, whole numbers of every width, complex, float8 and quantized tensors have no arithmetic here, and need none.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UsageError

_SMALL_BYTES = 2**16
"""Up to this size one call of zlib is faster than torch's loops, which take microseconds to begin."""
_ROW = 2048
_ODD = 0x9E3779B97F4A7C15 - 2**64


def layout_of(tensor: torch.Tensor) -> str:
    """What must be equal for the bytes of two tensors to mean the same, as text: dtype, shape, and how a quantized one
    is scaled."""
    dtype, shape, *scaling = meaning_of(tensor).items()
    return f"{dtype[1]}{shape[1]}" + "".join(f" {key} {value}" for key, value in scaling)


def meaning_of(tensor: torch.Tensor) -> dict[str, Any]:
    """What :func:`from_bytes` needs to know of a dense tensor beside its bytes, as JSON has it."""
    meaning: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if tensor.is_quantized and _is_per_tensor(tensor):
        meaning.update(scale=tensor.q_scale(), zero_point=tensor.q_zero_point())
    elif tensor.is_quantized:
        scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        meaning.update(axis=tensor.q_per_channel_axis(), scale=scales.tolist(), zero_point=zero_points.tolist())
    return meaning


def from_bytes(data: torch.Tensor, meaning: Mapping[str, Any]) -> torch.Tensor:
    """A new tensor on the CPU from its bytes (uint8[:]) and :func:`meaning_of` it."""
    dtype = getattr(torch, meaning["dtype"])
    if "scale" not in meaning:
        found = torch.empty(meaning["shape"], dtype=dtype, device="cpu")
    elif "axis" not in meaning:
        found = torch._empty_affine_quantized(
            meaning["shape"], scale=meaning["scale"], zero_point=meaning["zero_point"], dtype=dtype
        )
    else:
        found = torch._empty_per_channel_affine_quantized(
            meaning["shape"],
            scales=torch.tensor(meaning["scale"], dtype=torch.float64, device="cpu"),
            zero_points=torch.tensor(meaning["zero_point"], device="cpu"),
            axis=meaning["axis"],
            dtype=dtype,
        )
    write_bytes(found, data)
    return found


def _is_per_tensor(tensor: torch.Tensor) -> bool:
    return tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)


def require_dense(name: str, tensor: torch.Tensor) -> None:
    """UsageError for a tensor whose bytes do not lie in one memory."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise UsageError(
            f"{name!r} is a {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')} tensor, "
            "which cannot be given to other ranks, compared or saved; make it dense"
        )


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a dense tensor in row-major order as uint8[:], on the tensor's device; a view where it is
    contiguous. Of a meta tensor, which has none: nothing."""
    tensor = tensor.detach()
    if tensor.is_meta or not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def write_bytes(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """The reverse of :func:`bytes_of`, in place, wherever and however ``tensor`` lies."""
    target = tensor.detach()
    if target.is_meta or not target.numel():
        return
    if target.is_quantized:
        # Quantized memory has no other view: it is written through its storage, element by element in row-major order.
        plain = torch.empty(target.shape, dtype=target.int_repr().dtype, device=target.device)
        write_bytes(plain, data)
        width = plain.element_size()
        memory = torch.empty(0, dtype=plain.dtype, device=target.device)
        memory.set_(
            target.untyped_storage(),
            target.storage_offset() * target.element_size() // width,
            plain.shape,
            target.stride(),
        )
        memory.copy_(plain)
        return
    # Of an expanded tensor each number is written once.
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if size > 1 and stride == 0:
            data = _first_of(data, target, dim)
            target = target.narrow(dim, 0, 1)
    plain = torch.empty(target.shape, dtype=target.dtype, device=data.device)
    plain.view(-1).view(torch.uint8).copy_(data)
    with torch.no_grad():
        target.copy_(plain)


def _first_of(data: torch.Tensor, tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Of the bytes of ``tensor`` those of the first index of dimension ``dim``."""
    whole = data.view(*tensor.shape, tensor.element_size())
    return whole.narrow(dim, 0, 1).reshape(-1)


def fingerprint(tensor: torch.Tensor) -> int | torch.Tensor:
    """64 bits that differ where the tensors' bytes do: an int, or int64[] on a GPU, without waiting for it.

    Sums of 64-bit words, weighted by their place; not proof against an adversary, but against every change of one
    number, and all but 2^-64 of the others. Cost: two passes over the tensor at the speed of its memory.
    """
    data = bytes_of(tensor)
    if data.device.type == "cpu" and data.numel() <= _SMALL_BYTES:
        return zlib.crc32(data.numpy().data)
    even = data.numel() // 8 * 8
    whole = data[:even]
    if whole.data_ptr() % 8 or whole.storage_offset() % 8:
        whole = whole.clone()
    words, tail = whole.view(torch.int64), data[even:].long()
    square = words[: words.numel() // _ROW * _ROW].view(-1, _ROW)
    rest = words[square.numel() :]
    total = _weighed(square.sum(0)) + 3 * _weighed(square.sum(1)) + 5 * _weighed(rest) + 7 * _weighed(tail)
    return total if total.is_cuda else int(total)


def _weighed(words: torch.Tensor) -> torch.Tensor:
    """The sum of all words, each multiplied by an odd number of its own; int64[], modulo 2^64."""
    places = torch.arange(words.numel(), dtype=torch.int64, device=words.device)
    return (words * ((2 * places + 1) * _ODD)).sum()
