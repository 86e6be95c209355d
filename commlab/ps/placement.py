"""Who serves what: shards balanced by bytes. Big tensors are split over the servers, small tensors travel in groups.

    tensors    wte ................. ln.w ln.b attn.w ........ attn.b ...     registration order = forward order
    slices     0a 0b 0c 0d (split)   [1   2 ]  3a 3b 3c 3d     [4 ...         a group lies whole on one server
    server     0  1  2  3             2        0  1  3  2       0             always those with the fewest bytes so far

So at every moment of backward, and of the pull that follows, all servers are busy, and every server's slices are in
forward order: the smaller a slice's number, the sooner forward needs the slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ..chunks import Range, split
from ..errors import UsageError
from .messages import MESSAGE_BYTES

UNIT_BYTES = 64 * 1024
"""Tensors of two units and more are split; smaller tensors are gathered until they fill a unit."""
_ALIGN = 16


class Entry(NamedTuple):
    """A tensor as all ranks know it. ``group``: its group in the optimizer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int = 0

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Slice(NamedTuple):
    """Numbers ``start .. stop - 1`` of tensor ``entry`` (flattened), which ``server`` owns: its slice ``number``, which
    lies from ``offset`` on in the server's flat tensor of the dtype."""

    entry: int
    start: int
    stop: int
    server: int
    number: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class Placement(NamedTuple):
    """Which server owns which slices of which tensors."""

    entries: tuple[Entry, ...]
    of_entry: tuple[tuple[Slice, ...], ...]
    """The slices of each tensor, in order; a tensor without numbers has none."""
    of_server: tuple[tuple[Slice, ...], ...]
    """The slices of each server, in forward order."""

    @property
    def bytes_per_server(self) -> list[int]:
        return [
            sum(owned.numel * self.entries[owned.entry].dtype.itemsize for owned in slices) for slices in self.of_server
        ]

    @property
    def imbalance(self) -> float:
        """How much more than the mean the fullest server has: 0.01 is one per cent."""
        loads = self.bytes_per_server
        return max(loads) * len(loads) / sum(loads) - 1 if sum(loads) else 0.0

    def describe(self) -> str:
        loads = self.bytes_per_server
        return (
            f"{sum(loads) / 1e6:.1f} MB in {sum(map(len, self.of_server))} parts on {len(loads)} "
            f"server{'s' * (len(loads) > 1)}: {min(loads) / 1e6:.2f} .. {max(loads) / 1e6:.2f} MB each, "
            f"imbalance {self.imbalance:.1%}"
        )


def deal(entries: Iterable[Entry], servers: int) -> Placement:
    """Deal ``entries``, in the order in which forward needs them, out to ``servers``. All ranks that deal the same
    entries get the same placement."""
    entries = tuple(entries)
    total_bytes = sum(entry.nbytes for entry in entries)
    # Small models are spread too: servers then differ by a few per cent at most.
    unit_bytes = max(1, min(UNIT_BYTES, total_bytes // (32 * servers)))
    loads = [0] * servers
    ranges: list[list[tuple[int, Range]]] = [[] for _ in entries]
    group: list[int] = []
    group_bytes = 0

    def give(server: int, entry: int, numbers: Range) -> None:
        itemsize = entries[entry].dtype.itemsize
        messages = max(1, -(-numbers.numel * itemsize // MESSAGE_BYTES))
        for cut in split(numbers.numel, messages, _ALIGN):
            if cut.numel:
                ranges[entry].append((server, Range(numbers.start + cut.start, numbers.start + cut.stop)))
        loads[server] += numbers.numel * itemsize

    def close_group() -> None:
        emptiest = min(range(servers), key=loads.__getitem__)
        for entry in group:
            give(emptiest, entry, Range(0, entries[entry].numel))
        group.clear()

    for at, entry in enumerate(entries):
        nbytes = entry.nbytes
        owners = min(servers, nbytes // unit_bytes)
        if owners >= 2:
            close_group()
            group_bytes = 0
            emptiest = sorted(range(servers), key=loads.__getitem__)[:owners]
            for server, numbers in zip(emptiest, split(entry.numel, owners, _ALIGN), strict=True):
                give(server, at, numbers)
            continue
        group.append(at)
        group_bytes += nbytes
        if group_bytes >= unit_bytes:
            close_group()
            group_bytes = 0
    close_group()
    return _numbered(entries, ranges, servers)


def _numbered(entries: tuple[Entry, ...], ranges: list[list[tuple[int, Range]]], servers: int) -> Placement:
    of_server: list[list[Slice]] = [[] for _ in range(servers)]
    of_entry: list[list[Slice]] = [[] for _ in entries]
    filled: dict[tuple[int, torch.dtype], int] = {}
    for at, entry in enumerate(entries):
        for server, numbers in ranges[at]:
            offset = filled.get((server, entry.dtype), 0)
            owned = Slice(at, numbers.start, numbers.stop, server, len(of_server[server]), offset)
            filled[server, entry.dtype] = offset + numbers.numel
            of_server[server].append(owned)
            of_entry[at].append(owned)
    return Placement(entries, tuple(map(tuple, of_entry)), tuple(map(tuple, of_server)))


def server_ranks(nodes: Sequence[Sequence[int]], servers: int) -> tuple[int, ...]:
    """Which ranks serve: spread over the nodes, from the last node backwards, the last ranks of each; so rank 0, which
    reports to the user, is a worker. UsageError unless at least one rank is left to train."""
    size = sum(map(len, nodes))
    if not 0 < servers < size:
        raise UsageError(
            f"{servers} servers among {size} rank{'s' * (size > 1)}: there must be at least one server, and one rank "
            f"that is none; give 1 to {size - 1} servers or start more ranks"
        )
    free = [[rank for rank in sorted(node) if rank] for node in nodes]
    count = [0] * len(free)
    chosen: list[int] = []
    while len(chosen) < servers:
        at = min((at for at, node in enumerate(free) if node), key=lambda at: (count[at], -at))
        chosen.append(free[at].pop())
        count[at] += 1
    return tuple(sorted(chosen))
