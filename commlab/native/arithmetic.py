"""Element-wise arithmetic on ranges of flat tensors, as `commlab.native` describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from commlab.native import library
from commlab.native.dtypes import DTYPES, HALVES, OP_CODES

if TYPE_CHECKING:
    from torch import Tensor


def reduce(dst: Tensor, dst_start: int, src: Tensor, src_start: int, numel: int, op: str) -> None:
    """dst[dst_start + i] = dst[dst_start + i] OP src[src_start + i] for i < numel; op: sum, prod, min, max.

    Same dtype on both sides. The ranges are the same or do not overlap.
    """
    dtype = dst.dtype
    if dtype not in DTYPES or src.dtype is not dtype:
        raise _wrong_dtypes("reduce", "two tensors of one dtype of fp32, fp64, fp16, bf16, int32, int64", dst, src)
    code, item_bytes = DTYPES[dtype]
    to = address_of("reduce dst", dst, dst_start, numel, item_bytes)
    frm = address_of("reduce src", src, src_start, numel, item_bytes)
    active = library.active
    if active is not None:
        active.reduce(to, frm, numel, code, _op_code(op))
    else:
        _torch_combine(_part(dst, dst_start, numel), _part(src, src_start, numel), op)


def accumulate(dst: Tensor, dst_start: int, src: Tensor, src_start: int, numel: int, op: str) -> None:
    """Combine 16-bit src into fp32 dst, widening on the way: exact but for the fp32 operation itself."""
    if src.dtype not in HALVES or dst.dtype is not torch.float32:
        raise _wrong_dtypes("accumulate", "dst in fp32, src in fp16 or bf16", dst, src)
    to = address_of("accumulate dst", dst, dst_start, numel, 4)
    frm = address_of("accumulate src", src, src_start, numel, 2)
    active = library.active
    if active is not None:
        active.accumulate(to, frm, numel, DTYPES[src.dtype][0], _op_code(op))
    else:
        _torch_combine(_part(dst, dst_start, numel), _part(src, src_start, numel).float(), op)


def widen(dst: Tensor, dst_start: int, src: Tensor, src_start: int, numel: int) -> None:
    """Write 16-bit src into fp32 dst. Exact."""
    if src.dtype not in HALVES or dst.dtype is not torch.float32:
        raise _wrong_dtypes("widen", "dst in fp32, src in fp16 or bf16", dst, src)
    to = address_of("widen dst", dst, dst_start, numel, 4)
    frm = address_of("widen src", src, src_start, numel, 2)
    active = library.active
    if active is not None:
        active.widen(to, frm, numel, DTYPES[src.dtype][0])
    else:
        _part(dst, dst_start, numel).copy_(_part(src, src_start, numel))


def narrow(dst: Tensor, dst_start: int, src: Tensor, src_start: int, numel: int, divisor: float = 1.0) -> None:
    """Write fp32 src / divisor into 16-bit dst.

    Two roundings: the fp32 division (none where the divisor is a power of two) and the cast. A divisor and not a
    factor, because the mean of 3 ranks is x / 3, and x * (1 / 3) is another number for about a third of all x.
    """
    if dst.dtype not in HALVES or src.dtype is not torch.float32:
        raise _wrong_dtypes("narrow", "dst in fp16 or bf16, src in fp32", dst, src)
    to = address_of("narrow dst", dst, dst_start, numel, 2)
    frm = address_of("narrow src", src, src_start, numel, 4)
    active = library.active
    if active is not None:
        active.narrow(to, frm, numel, DTYPES[dst.dtype][0], divisor)
    else:
        _part(dst, dst_start, numel).copy_(_part(src, src_start, numel) / divisor)


def scale(dst: Tensor, dst_start: int, numel: int, factor: float) -> None:
    """dst[dst_start + i] *= factor, floating point only. The factor is first rounded to fp32, except for fp64."""
    code, item_bytes = _float_dtype("scale", dst)
    to = address_of("scale dst", dst, dst_start, numel, item_bytes)
    active = library.active
    if active is not None:
        active.scale(to, numel, code, factor)
    else:
        _part(dst, dst_start, numel).mul_(factor)


def divide(dst: Tensor, dst_start: int, numel: int, divisor: float) -> None:
    """dst[dst_start + i] /= divisor, correctly rounded, floating point only."""
    code, item_bytes = _float_dtype("divide", dst)
    to = address_of("divide dst", dst, dst_start, numel, item_bytes)
    active = library.active
    if active is not None:
        active.divide(to, numel, code, divisor)
    else:
        _part(dst, dst_start, numel).div_(divisor)


def reduce_rows(dst: Tensor, dst_start: int, rows: Tensor, numel: int, op: str, divisor: float = 1.0) -> None:
    """dst[dst_start + i] = (rows[0, i] OP rows[1, i] OP ...) / divisor for i < numel.

    Same dtype on both sides; 16-bit numbers are combined and divided in fp32 and rounded once. ``rows``: 2-D, each row
    contiguous, of up to 512 ranks; plain torch may overwrite it.
    """
    dtype = rows.dtype
    if dtype not in DTYPES or dst.dtype is not dtype:
        raise _wrong_dtypes(
            "reduce_rows", "two tensors of one dtype of fp32, fp64, fp16, bf16, int32, int64", dst, rows
        )
    code, item_bytes = DTYPES[dtype]
    to = address_of("reduce_rows dst", dst, dst_start, numel, item_bytes)
    if rows.dim() != 2 or not 0 <= numel <= rows.shape[1] or (numel > 1 and rows.stride(1) != 1):
        raise ValueError(f"native.reduce_rows of {numel} numbers cannot read rows of shape {tuple(rows.shape)}")
    active = library.active
    if active is not None and hasattr(active, "gather_reduce"):
        start, row_bytes = rows.data_ptr(), rows.stride(0) * item_bytes
        sources = [start + row * row_bytes for row in range(rows.shape[0])]
        active.gather_reduce([to], code, sources, code, numel, _op_code(op), divisor, False)
        return
    part = _part(dst, dst_start, numel)
    total = rows[0, :numel].float() if dtype in HALVES else rows[0, :numel]
    for row in rows[1:]:
        _torch_combine(total, row[:numel].float() if dtype in HALVES else row[:numel], op)
    part.copy_(total if divisor == 1 else total / divisor)


def address_of(what: str, tensor: Tensor, start: int, numel: int, item_bytes: int) -> int:
    """The address of number `start` of the tensor, once it is certain that `numel` numbers lie there."""
    if 0 <= start <= start + numel <= tensor.numel() and tensor.is_cpu and tensor.is_contiguous():
        return tensor.data_ptr() + start * item_bytes
    raise range_error(what, tensor, start, numel)


def range_error(what: str, tensor: Tensor, start: int, numel: int) -> ValueError:
    """For a tensor in whose memory `numel` numbers from `start` on do not lie side by side."""
    if not tensor.is_cpu or not tensor.is_contiguous():
        return ValueError(
            f"native.{what} must be a contiguous CPU tensor, not shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}, on {tensor.device}"
        )
    return ValueError(f"native.{what}[{start}:{start + numel}] reaches outside its tensor of {tensor.numel()} numbers")


def _part(tensor: Tensor, start: int, numel: int) -> Tensor:
    return tensor.view(-1)[start : start + numel]


def _float_dtype(function: str, dst: Tensor) -> tuple[int, int]:
    if not dst.is_floating_point() or dst.dtype not in DTYPES:
        raise TypeError(f"native.{function} takes fp32, fp64, fp16 or bf16, not {dst.dtype}")
    return DTYPES[dst.dtype]


def _wrong_dtypes(function: str, wanted: str, dst: Tensor, src: Tensor) -> TypeError:
    return TypeError(f"native.{function} takes {wanted}; dst is {dst.dtype}, src is {src.dtype}")


def _op_code(op: str) -> int:
    try:
        return OP_CODES[op]
    except KeyError:
        raise ValueError(f"op {op!r} does not exist; there are {', '.join(OP_CODES)}") from None


def _torch_combine(dst: Tensor, src: Tensor, op: str) -> None:
    if op == "sum":
        dst.add_(src)
    elif op == "prod":
        dst.mul_(src)
    elif op == "min":
        torch.minimum(dst, src, out=dst)
    elif op == "max":
        torch.maximum(dst, src, out=dst)
    else:
        _op_code(op)
