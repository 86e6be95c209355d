"""Adasum: gradients of two halves of the ranks are combined so that what they have in common counts once.

    a, b  ->  (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b

S. Maleki et al., "Scaling distributed training with adaptive summation", MLSys 2021. Combined on the schedule of
recursive halving: at each level two ranks exchange halves of what they hold, and the ranks that hold pieces of the same
two vectors add their dot products. Dot products are added in fp64, in rank order, so all ranks have the same bits.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from ..chunks import Range
from ..collectives.delivery import bytes_of, deliver_async
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.handle import Handle
from .tick import Waits, until

_NOTHING = Range(0, 0)


def adasum(group: Group, numbers: torch.Tensor) -> Waits:
    """Replace ``numbers`` (1-D, float32 or float64, contiguous, on the CPU) by the Adasum of all ranks' ones.
    Collective. Ranks beyond the largest power of two are combined with the first ones before. Cost: every rank sends
    2 n, and 3 numbers to each other rank at each level."""
    rank, size = group.rank, group.size
    power = 1 << (size.bit_length() - 1)
    extra = size - power
    if extra:
        # Rank power + i gives everything to rank i.
        sends = {rank - power: Range(0, numbers.numel())} if rank >= power else {}
        wants = {rank + power: Range(0, numbers.numel())} if rank < extra else {}
        other = yield from _swap(group, numbers, sends, wants)
        if other is not None:
            _combine(numbers, other, _dots(numbers, other))
    held = Range(0, numbers.numel()) if rank < power else _NOTHING
    distance = 1
    while distance < power:
        middle = held.start + held.numel // 2
        peer = rank ^ distance
        low = not rank & distance
        kept, handed = (Range(held.start, middle), Range(middle, held.stop))
        if not low:
            kept, handed = handed, kept
        sends = {peer: handed} if rank < power else {}
        wants = {peer: kept} if rank < power else {}
        other = yield from _swap(group, numbers, sends, wants)
        own = numbers[kept.start : kept.stop]
        part = torch.zeros(3, dtype=torch.float64, device="cpu")
        if other is not None:
            # a is the vector of the lower rank's block, whoever holds the piece.
            part = _dots(own, other) if low else _dots(other, own)
        parts = yield from _gather(group, part)
        if other is not None:
            block = rank // (2 * distance) * 2 * distance
            total = torch.zeros(3, dtype=torch.float64, device="cpu")
            for each in parts[block : block + 2 * distance]:
                total += each
            if low:
                _combine(own, other, total)
            else:
                _combine(own, other, total[[0, 2, 1]])
        held, distance = kept if rank < power else _NOTHING, distance * 2
    yield from _all_pieces(group, numbers, held)


def _dots(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide_a, wide_b = a.double(), b.double()
    return torch.stack([wide_a.dot(wide_b), wide_a.dot(wide_a), wide_b.dot(wide_b)])


def _combine(own: torch.Tensor, other: torch.Tensor, dots: torch.Tensor) -> None:
    """``dots``: own . other, own . own, other . other, over whole vectors. A vector of zeros adds nothing."""
    dot, of_own, of_other = dots.tolist()
    own.mul_(1 - dot / (2 * of_own) if of_own else 1.0)
    own.add_(other, alpha=1 - dot / (2 * of_other) if of_other else 1.0)


def _swap(
    group: Group, numbers: torch.Tensor, sends: dict[int, Range], wants: dict[int, Range]
) -> Generator[Handle | None, None, torch.Tensor | None]:
    """Send ranges of ``numbers``; returns what the one peer of ``wants`` has sent, None where nobody sends."""
    width = numbers.element_size()
    ranges = [
        Range(span.start * width, span.stop * width) if (span := sends.get(peer)) else _NOTHING
        for peer in range(group.size)
    ]
    outs = [
        torch.empty(wants[peer].numel if peer in wants else 0, dtype=numbers.dtype, device="cpu")
        for peer in range(group.size)
    ]
    rooms = [bytes_of(out) for out in outs]
    yield from until(deliver_async(group, Signature("horovod's adasum"), [bytes_of(numbers)], ranges, rooms))
    return outs[next(iter(wants))] if wants else None


def _gather(group: Group, part: torch.Tensor) -> Generator[Handle | None, None, list[torch.Tensor]]:
    """Every rank's three numbers."""
    outs = [torch.empty(3, dtype=torch.float64, device="cpu") for _ in range(group.size)]
    stream = [bytes_of(part)]
    ranges = [Range(0, part.numel() * part.element_size())] * group.size
    rooms = [bytes_of(out) for out in outs]
    yield from until(deliver_async(group, Signature("horovod's adasum"), stream, ranges, rooms))
    return outs


def _all_pieces(group: Group, numbers: torch.Tensor, held: Range) -> Waits:
    """Every rank's piece to all ranks."""
    width = numbers.element_size()
    pieces = _pieces(group, numbers.numel())
    content = bytes_of(numbers)
    own = Range(held.start * width, held.stop * width)
    outs: Sequence[torch.Tensor] = [
        torch.empty(piece.numel * width, dtype=torch.uint8, device="cpu") for piece in pieces
    ]
    yield from until(deliver_async(group, Signature("horovod's adasum"), [content], [own] * group.size, outs))
    for piece, out in zip(pieces, outs, strict=True):
        content[piece.start * width : piece.stop * width].copy_(out)


def _pieces(group: Group, numel: int) -> list[Range]:
    """What each rank holds at the end."""
    power = 1 << (group.size.bit_length() - 1)
    found = []
    for rank in range(group.size):
        held, distance = (Range(0, numel), 1) if rank < power else (_NOTHING, power)
        while distance < power:
            middle = held.start + held.numel // 2
            held = Range(middle, held.stop) if rank & distance else Range(held.start, middle)
            distance *= 2
        found.append(held)
    return found
