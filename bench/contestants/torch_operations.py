"""The operations of torch.distributed on tensors of known numbers, in a process group of any backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist


class TorchOperation(NamedTuple):
    """``call()``: the operation, again and again; ``wrong()``: how many of this rank's results are not what they must
    be after one call on the numbers that are there at first; ``size_bytes``: of the largest tensor."""

    call: Callable[[], object]
    wrong: Callable[[], int]
    size_bytes: int


class _Numbers:
    """What rank r has: P parts of equal size, part p full of r + p / 8, which float32 holds exactly, and their sums
    over the ranks too."""

    def __init__(self, size_bytes: int, rank: int, size: int, zeros: bool):
        self.rank, self.size, self.numel = rank, size, max(1, size_bytes // 4)
        self.part_numel = max(1, self.numel // size)
        self.total = size * (size - 1) / 2
        self.parts = torch.zeros(size * self.part_numel) if zeros else self.of(rank)
        self.room = torch.empty_like(self.parts)
        self.whole = self.parts.new_zeros(self.numel) if zeros else self.longer(self.of(rank))

    def of(self, rank: float, weight: int = 1) -> torch.Tensor:
        """All parts of ``rank``; with all ranks' sum and their number as ``weight`` the sum of all."""
        return torch.cat([torch.full((self.part_numel,), rank + weight * part / 8) for part in range(self.size)])

    def longer(self, parts: torch.Tensor) -> torch.Tensor:
        """As many numbers as were asked for, whether they can be cut or not."""
        return torch.cat([parts, parts])[: self.numel]

    def part(self, of: torch.Tensor, rank: int) -> torch.Tensor:
        return of[rank * self.part_numel : (rank + 1) * self.part_numel]

    def differ(self, found: torch.Tensor, want: torch.Tensor) -> int:
        return int((found != want).sum())


def _all_reduce(n: _Numbers, group: Any) -> TorchOperation:
    want = n.longer(n.of(n.total, n.size))
    return TorchOperation(
        lambda: dist.all_reduce(n.whole, group=group), lambda: n.differ(n.whole, want), n.whole.nbytes
    )


def _broadcast(n: _Numbers, group: Any) -> TorchOperation:
    want = n.longer(n.of(0))
    return TorchOperation(
        lambda: dist.broadcast(n.whole, 0, group=group), lambda: n.differ(n.whole, want), n.whole.nbytes
    )


def _reduce(n: _Numbers, group: Any) -> TorchOperation:
    want = n.longer(n.of(n.total, n.size) if n.rank == 0 else n.of(n.rank))
    call = lambda: dist.reduce(n.whole, 0, group=group)  # noqa: E731
    # gloo leaves what it has added up so far on the other ranks, as torch allows.
    return TorchOperation(call, lambda: n.differ(n.whole, want) if n.rank == 0 else 0, n.whole.nbytes)


def _all_gather(n: _Numbers, group: Any) -> TorchOperation:
    outs, own = list(n.room.split(n.part_numel)), n.part(n.parts, 1)
    want = torch.cat([n.part(n.of(rank), 1) for rank in range(n.size)])
    return TorchOperation(
        lambda: dist.all_gather(outs, own, group=group), lambda: n.differ(n.room, want), n.room.nbytes
    )


def _all_gather_into_tensor(n: _Numbers, group: Any) -> TorchOperation:
    own, want = n.part(n.parts, 1), torch.cat([n.part(n.of(rank), 1) for rank in range(n.size)])
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
    return TorchOperation(lambda: gather(n.room, own, group=group), lambda: n.differ(n.room, want), n.room.nbytes)


def _reduce_scatter_tensor(n: _Numbers, group: Any) -> TorchOperation:
    out, want = n.part(n.room, 0), n.part(n.of(n.total, n.size), n.rank)
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # its name from torch 2.13 on
    return TorchOperation(lambda: scatter(out, n.parts, group=group), lambda: n.differ(out, want), n.parts.nbytes)


def _all_to_all_single(n: _Numbers, group: Any) -> TorchOperation:
    want = torch.cat([n.part(n.of(rank), n.rank) for rank in range(n.size)])
    call = lambda: dist.all_to_all_single(n.room, n.parts, group=group)  # noqa: E731
    return TorchOperation(call, lambda: n.differ(n.room, want), n.room.nbytes)


def _barrier(n: _Numbers, group: Any) -> TorchOperation:
    return TorchOperation(lambda: dist.barrier(group=group), lambda: 0, 0)


_MADE: Final[dict[str, Callable[[_Numbers, Any], TorchOperation]]] = {
    "all_reduce": _all_reduce,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "all_to_all_single": _all_to_all_single,
    "barrier": _barrier,
}
OPERATIONS: Final = tuple(_MADE)


def operation(name: str, size_bytes: int, group: Any, rank: int, size: int, zeros: bool = False) -> TorchOperation:
    """``name``, whose largest tensor on a rank has ``size_bytes``, as far as they can be cut into equal parts.
    ``zeros``: all numbers are 0, which stay so however often they are added up."""
    return _MADE[name](_Numbers(size_bytes, rank, size, zeros), group)
