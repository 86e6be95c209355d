"""Ranks of one process that are joined by links: an engine for each, over socket pairs instead of a network."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from closed_form import expected, numbers, same_bits

import commlab
from commlab.job.topology import Topology
from commlab.runtime.group import Group
from commlab.runtime.nodes import open_nodes
from commlab.transport.tcp import Links

T = TypeVar("T")
Nodes = tuple[tuple[int, ...], ...]


class Mesh:
    """``size`` ranks, each with links to all others. ``sockets[a][b]``: rank a's end of the connection to rank b, as
    the number of its descriptor, which belongs to the engine of rank a. ``narrow``: the sockets take few bytes at a
    time, so that frames are cut anywhere and wait half-way, as on a slow link. ``absent``: the last rank has no engine
    here, but in another process."""

    def __init__(self, size: int, checks: bool = True, narrow: bool = False, absent: int | None = None):
        self.size = size
        self.sockets = [[-1] * size for _ in range(size)]
        for one in range(size):
            for other in range(one):
                for (mine, peer), end in zip(((one, other), (other, one)), socket.socketpair(), strict=True):
                    if narrow:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                    self.sockets[mine][peer] = end.detach()
        self.links = [Links(rank, self.sockets[rank], checks) for rank in range(size) if rank != absent]
        self.transports = [links.world() for links in self.links]

    def groups(self, check: bool = True, timeout_s: float = 20.0, nodes: Nodes | None = None) -> list[Group]:
        """A group of all ranks, each rank on a node of its own; or on ``nodes``, with all that nodes have."""
        found = Topology(nodes or tuple((rank,) for rank in range(self.size)))
        groups = [Group(transport, found, timeout_s, check) for transport in self.transports]
        if nodes is not None:
            for error in on_all(groups, open_nodes):
                assert error is None, error
        return groups

    def close(self) -> None:
        for links in self.links:
            links.engine.leave(0.0)


class Job:
    """Ranks on nodes, with leaders. ``leaders``: the first rank of each node."""

    def __init__(self, nodes: Nodes, narrow: bool = False):
        self.nodes, self.size = nodes, sum(map(len, nodes))
        self.leaders = [node[0] for node in nodes]
        self.mesh = Mesh(self.size, narrow=narrow)
        self.groups = self.mesh.groups(nodes=nodes)
        assert all(group.leaders is not None for group in self.groups)

    def all(self, call: Callable[[Group], Any]) -> list[Any]:
        return on_all(self.groups, call)

    def require_whole(self, numel: int = 11) -> None:
        """All ranks still reduce."""
        assert all(right(each, self.size, numel) for each in self.all(lambda group: reduced(group, numel)))

    def close(self) -> None:
        on_all(self.groups, lambda group: group.close())
        self.mesh.close()


def on_all(items: list[Any], call: Callable[[Any], T], timeout_s: float = 60.0) -> list[T | BaseException]:
    """``call(item)`` for all items at once, a thread each; what each returned or raised."""
    with ThreadPoolExecutor(len(items)) as pool:
        futures = [pool.submit(call, item) for item in items]
        return [future.exception(timeout_s) or future.result() for future in futures]


def wait_for(request: Any, timeout_s: float = 20.0) -> None:
    """Return once the request is done; AssertionError when it is not within ``timeout_s``."""
    for _ in range(int(timeout_s / 0.1)):
        if request.test():
            return
        request.block(0.1)
    assert request.test(), f"still waiting for ranks {list(request.peers())}"


def reduced(group: Group, numel: int, dtype: torch.dtype = torch.float32, op: str = "sum") -> torch.Tensor:
    """The ranks' numbers of :mod:`closed_form`, reduced by a call that waits."""
    return commlab.allreduce(numbers(group.rank, numel, dtype, op), op, group=group)


def right(got: object, size: int, numel: int, dtype: torch.dtype = torch.float32, op: str = "sum") -> bool:
    """Whether that is what ``size`` ranks should get."""
    return isinstance(got, torch.Tensor) and same_bits(got + 0, expected(op, size, numel, dtype) + 0)


def late_and_queued(group: Group, late: int, late_s: float, numel: int = 3000) -> list[torch.Tensor]:
    """Sums of ``numel``, 5 and 200,000 numbers: rank ``late`` comes late, the largest is queued, and the next rank
    finds nothing under way before it asks for the 5."""
    if group.rank == late:
        time.sleep(late_s)
    first = reduced(group, numel)
    queued = commlab.allreduce_async(numbers(group.rank, 200_000, torch.float32), "sum", group=group)
    if group.rank == (late + 1) % group.size:
        queued.wait()
    return [first, reduced(group, 5), queued.wait()]


def noise(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers whose sums round, so that another order of adding gives other bits."""
    generator = torch.Generator().manual_seed(100 * rank + numel)
    if not dtype.is_floating_point:
        return torch.randint(-(2**31), 2**31 - 1, (numel,), generator=generator).to(dtype)
    return (torch.randn(numel, generator=generator, dtype=torch.float64) * 10 ** (rank % 3)).to(dtype)
