"""Buckets: parameters grouped in the order in which backward finishes them, each sent as soon as all its gradients are
there.

    registration order      wte  wpe  h.0 ...  h.11  ln_f            backward runs from the right to the left
    buckets                      [   bucket 2   ][ bucket 1 ][ 0 ]   so bucket 0 is ready first, and travels meanwhile

Every rank starts its buckets strictly in index order, so no message has to say which bucket the message belongs to.
Here buckets are planned; :mod:`.hooks` fills a bucket when it is complete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from ..chunks import Range
from ..native.norm import Squares
from .mirror import Mirror, mirrors
from .packer import Packer
from .parameters import NamedParameter, adjoining

USUAL_BYTES = 25 * 2**20

FAST_BYTE_S = 2.5e-9
"""Where a byte takes less, from 5 Gbit/s on, a bucket's own cost, half a millisecond of a core, is more than the
network has to hide. It is far from what networks have (3.2 ns at 2.5 Gbit/s, 1.6 at 5), so that all runs on one network
cut alike."""

_address = torch.Tensor.data_ptr


def own_storage(flat: torch.Tensor) -> torch.Tensor:
    """``flat`` (1-D, contiguous) as a tensor whose storage begins and ends with it. ``torch.save`` writes, and
    ``share_memory_()`` moves, whole storages: of a view those would be the numbers of all others."""
    owner: torch.Tensor = from_dlpack(to_dlpack(flat))
    return owner


@dataclass
class Bucket:
    """Parameters of one dtype and one optimizer group, whose gradients travel together in one flat buffer."""

    index: int
    parameters: list[NamedParameter]
    ranges: list[Range]
    """The range of each parameter in the flat buffer."""
    dtype: torch.dtype
    """The dtype of the flat buffer, which is that of the wire."""
    flat: torch.Tensor = field(repr=False)
    """The flat buffer: 1-D, in CPU memory."""
    mirror: Mirror | None = field(default=None, repr=False)
    """The flat buffer once more, on the GPU that the parameters are on; None where the parameters are on the CPU."""
    squares: Squares = field(default_factory=Squares)
    """The sum of the squares of the numbers of this bucket that this rank has reduced in this step."""
    waiting: set[int] = field(default_factory=set)
    """Indices of the parameters whose gradients are not there yet in this step."""

    def __post_init__(self) -> None:
        self.packer = Packer(self.ranges)
        self._gradients: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self.name = f"bucket {self.index}"
        """For messages and traces."""

    def gradients(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Of each parameter its range of ``flat``, which is :meth:`result`, in the parameter's shape. Each owns its
        storage, and is the same tensor in every step."""
        # Sharing a gradient's memory with another process moves the tensor, and leaves the bucket where it is.
        if list(map(_address, self._gradients)) != self._addresses or not self._gradients:
            self._gradients = [
                own_storage(flat[extent.start : extent.stop]).view(member.tensor.shape)
                for member, extent in zip(self.parameters, self.ranges, strict=True)
            ]
            self._addresses = list(map(_address, self._gradients))
        return self._gradients

    def result(self) -> torch.Tensor:
        """The reduced flat buffer, on the device that the parameters are on."""
        if self.mirror is None:
            return self.flat
        self.mirror.to_device()
        return self.mirror.device

    @property
    def numel(self) -> int:
        return self.flat.numel()


def usual_bytes(parameters: Iterable[NamedParameter], nodes: int, byte_s: float = math.inf) -> int:
    """How large buckets are where the user gives no size: 25 MiB. Between nodes a bucket has no more than a quarter of
    all gradients, so that most of a small model can leave during backward too; but at least 1 MiB, or 4 where a byte
    takes the network less than :data:`FAST_BYTE_S`."""
    if nodes == 1:
        return USUAL_BYTES
    least_bytes = (4 if byte_s < FAST_BYTE_S else 1) * 2**20
    return min(USUAL_BYTES, max(least_bytes, sum(parameter.nbytes for parameter in parameters) // 4))


def plan(
    parameters: Iterable[NamedParameter],
    bucket_bytes: int,
    wire: torch.dtype | None,
    allocate: Callable[[int, torch.dtype], torch.Tensor] = lambda numel, dtype: torch.empty(
        numel, dtype=dtype, device="cpu"
    ),
) -> list[Bucket]:
    """Fill buckets of at most ``bucket_bytes`` (more where one parameter is larger) in reverse registration order.

    A bucket holds one dtype, one device and one optimizer group, so that a chunk of the bucket can be updated as one.
    Buckets are numbered in the order in which backward completes them. ``wire``: the dtype in which gradients travel;
    None: each bucket's own. ``allocate(numel, dtype)`` makes a flat buffer: 1-D, on the CPU.
    """
    open_buckets: dict[tuple[torch.dtype, torch.device, int], list[NamedParameter]] = {}
    closed: list[list[NamedParameter]] = []
    for parameter in reversed(list(parameters)):
        key = parameter.tensor.dtype, parameter.tensor.device, parameter.group
        members = open_buckets.setdefault(key, [])
        if members and sum(member.nbytes for member in members) + parameter.nbytes > bucket_bytes:
            closed.append(members)
            members = open_buckets[key] = []
        members.append(parameter)
    closed.extend(members for members in open_buckets.values() if members)
    # A bucket is complete when its last member is, which is the one registered first.
    closed.sort(key=lambda members: -members[-1].index)
    buckets = []
    for index, members in enumerate(closed):
        ranges = adjoining(members)
        dtype = wire or members[0].tensor.dtype
        flat, device = allocate(ranges[-1].stop, dtype), members[0].tensor.device
        mirror = Mirror(flat, device) if mirrors(device) else None
        buckets.append(Bucket(index, members, ranges, dtype, flat, mirror))
    return buckets
