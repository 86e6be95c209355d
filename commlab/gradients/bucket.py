"""Buckets: parameters grouped in the order in which backward finishes them, each sent as soon as all its gradients are
there.

    registration order      wte  wpe  h.0 ...  h.11  ln_f            backward runs from the right to the left
    buckets                      [   bucket 2   ][ bucket 1 ][ 0 ]   so bucket 0 is ready first, and travels meanwhile

Every rank starts its buckets strictly in index order, so no message has to say which bucket it belongs to. What one
does with a ready bucket is not known here: it is given to ``launch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from ..chunks import Range
from ..native.norm import Squares
from .mirror import Mirror, mirrors
from .packer import Packer
from .parameters import NamedParameter

USUAL_BYTES = 25 * 2**20


@dataclass
class Bucket:
    """Parameters of one dtype and one optimizer group, and where each lies in the flat buffer."""

    index: int
    parameters: list[NamedParameter]
    ranges: list[Range]
    dtype: torch.dtype
    """Of the flat buffer, that is of the wire."""
    flat: torch.Tensor = field(repr=False)
    """In CPU memory."""
    mirror: Mirror | None = field(default=None, repr=False)
    """``flat`` on the GPU that the parameters are on."""
    squares: Squares = field(default_factory=Squares)
    """Of what this rank reduces of it in this step."""
    waiting: set[int] = field(default_factory=set)
    """Indices of the parameters whose gradients are not there yet."""

    def __post_init__(self) -> None:
        self.packer = Packer(self.ranges)

    def pack(self, gradients: list[torch.Tensor | None], scale: float) -> bool:
        """Write the gradients to ``flat``, on the way there where they are on a GPU; whether they are finite, as far as
        is known by now (:meth:`Packer.finite`)."""
        if self.mirror is None:
            return self.packer.pack(gradients, self.flat, scale)
        finite = self.packer.pack(gradients, self.mirror.device, scale)
        self.mirror.to_host()
        return finite

    def result(self) -> torch.Tensor:
        """``flat``, reduced, where the parameters are."""
        if self.mirror is None:
            return self.flat
        self.mirror.to_device()
        return self.mirror.device

    @property
    def numel(self) -> int:
        return self.flat.numel()

    @property
    def name(self) -> str:
        return f"bucket {self.index}"


def usual_bytes(parameters: Iterable[NamedParameter], nodes: int) -> int:
    """How large buckets are where nobody says: 25 MiB; between nodes, where links are slow, no more than a quarter of
    all gradients, so that most of a small model can leave during backward too, but 1 MiB."""
    if nodes == 1:
        return USUAL_BYTES
    total_bytes = sum(each.tensor.numel() * each.tensor.element_size() for each in parameters)
    return min(USUAL_BYTES, max(2**20, total_bytes // 4))


def plan(
    parameters: Iterable[NamedParameter],
    bucket_bytes: int,
    wire: torch.dtype | None,
    allocate: Callable[[int, torch.dtype], torch.Tensor] = lambda numel, dtype: torch.empty(numel, dtype=dtype),
) -> list[Bucket]:
    """Fill buckets of at most ``bucket_bytes`` (more where one parameter is larger) in reverse registration order.

    A bucket holds one dtype, one device and one optimizer group, so that a chunk of it can be updated as one. Buckets
    are numbered in the order in which backward completes them. ``allocate(numel, dtype)`` makes their flat buffers:
    1-D, CPU.
    """
    open_buckets: dict[tuple[torch.dtype, torch.device, int], list[NamedParameter]] = {}
    closed: list[list[NamedParameter]] = []
    for parameter in reversed(list(parameters)):
        key = parameter.tensor.dtype, parameter.tensor.device, parameter.group
        members = open_buckets.setdefault(key, [])
        filled = sum(member.tensor.numel() * member.tensor.element_size() for member in members)
        if members and filled + parameter.tensor.numel() * parameter.tensor.element_size() > bucket_bytes:
            closed.append(members)
            members = open_buckets[key] = []
        members.append(parameter)
    closed.extend(members for members in open_buckets.values() if members)
    # Complete when its last member is: the one registered first.
    closed.sort(key=lambda members: -members[-1].index)
    buckets = []
    for index, members in enumerate(closed):
        ranges = adjoining(members)
        dtype = wire or members[0].tensor.dtype
        flat, device = allocate(ranges[-1].stop, dtype), members[0].tensor.device
        mirror = Mirror(flat, device) if mirrors(device) else None
        buckets.append(Bucket(index, members, ranges, dtype, flat, mirror))
    return buckets


def adjoining(members: Iterable[NamedParameter]) -> list[Range]:
    """Where each lies when all lie side by side."""
    ranges, at = [], 0
    for member in members:
        ranges.append(Range(at, at + member.tensor.numel()))
        at = ranges[-1].stop
    return ranges
