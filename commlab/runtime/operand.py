"""The flat buffer of one rank as the executor sees it: what is done to its numbers, and in what precision."""

from __future__ import annotations

import torch

from .. import native
from ..chunks import Range
from ..native.dtypes import HALVES
from ..transport.base import Bytes


def byte_view(tensor: torch.Tensor) -> Bytes:
    """The bytes of a contiguous CPU tensor, without a copy."""
    # A dimension of one number may have any stride and be contiguous, but not be seen as bytes.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


class Operand:
    """The flat buffer of one rank, what is done to it, and in what precision.

    ``op``: sum, prod, min or max. ``divisor``: the owner divides its chunk by it (mean). ``own``: given for a 16-bit
    buffer whose contributions all meet at the owner: that range is summed in fp32, divided, and only then rounded into
    the buffer; or not rounded at all but left in ``wide`` (fp32, ``own.numel``) where that is given.
    """

    def __init__(
        self,
        buffer: torch.Tensor,
        op: str = "sum",
        divisor: float = 1,
        own: Range | None = None,
        wide: torch.Tensor | None = None,
    ):
        assert buffer.dim() == 1 and buffer.is_contiguous() and buffer.device.type == "cpu"
        self.buffer, self.op, self.divisor, self.own = buffer, op, divisor, own
        self.itemsize = buffer.element_size()
        self.bytes = byte_view(buffer)
        self.accumulator: torch.Tensor | None = None
        self.rounds = wide is None
        if own is not None:
            self.accumulator = torch.empty(own.numel, dtype=torch.float32, device="cpu") if wide is None else wide
            native.widen(self.accumulator, 0, buffer, own.start, own.numel)

    def view(self, segment: Range) -> Bytes:
        return self.bytes[segment.start * self.itemsize : segment.stop * self.itemsize]

    def reduce(self, segment: Range, scratch: torch.Tensor) -> None:
        """Combine ``scratch[: segment.numel]`` into ``segment``."""
        if self.accumulator is not None and self.own is not None:
            assert self.own.start <= segment.start and segment.stop <= self.own.stop, (segment, self.own)
            native.accumulate(self.accumulator, segment.start - self.own.start, scratch, 0, segment.numel, self.op)
        else:
            native.reduce(self.buffer, segment.start, scratch, 0, segment.numel, self.op)

    def finish(self, segment: Range) -> None:
        """Divide, and round to the buffer's dtype, once."""
        if self.accumulator is not None and self.own is not None:
            start = segment.start - self.own.start
            if self.rounds:
                native.narrow(self.buffer, segment.start, self.accumulator, start, segment.numel, self.divisor)
            elif self.divisor != 1:
                native.divide(self.accumulator, start, segment.numel, self.divisor)
        elif self.divisor != 1:
            native.divide(self.buffer, segment.start, segment.numel, self.divisor)


def operand_of(
    flat: torch.Tensor,
    op: str,
    divisor: float,
    meets_at_owner: bool,
    own: Range,
    wide: torch.Tensor | None = None,
) -> Operand:
    """How a schedule treats this buffer (docs/rounding.md).

    16-bit numbers are summed in fp32 at the owner, who divides before it rounds, where all contributions meet there;
    elsewhere partial sums are rounded at every hop, so a mean is divided first, which keeps the sum in range.
    """
    if flat.dtype not in HALVES:
        return Operand(flat, op, divisor)
    if meets_at_owner:
        return Operand(flat, op, divisor, own, wide)
    if divisor != 1:
        native.divide(flat, 0, flat.numel(), divisor)
    return Operand(flat, op)
