"""Which ranks share a node: ranks on hosts of one name, or as declared by hand with ``--nodes``."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import UsageError
from . import limits


@dataclass(frozen=True)
class Topology:
    """The nodes of a group: a tuple of tuples of ranks, nodes ordered by their lowest rank, ranks ascending."""

    nodes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = sorted(rank for node in self.nodes for rank in node)
        assert ranks == list(range(len(ranks))), f"every rank lies on exactly one node: {self.nodes}"

    @property
    def size(self) -> int:
        return sum(map(len, self.nodes))

    def node_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that share ``rank``'s node, itself included."""
        return next(node for node in self.nodes if rank in node)

    def local_rank(self, rank: int) -> int:
        return self.node_of(rank).index(rank)

    @property
    def local_ranks(self) -> list[int]:
        """Every rank's number on its node."""
        return [self.local_rank(rank) for rank in range(self.size)]

    def subgroup(self, ranks: Sequence[int]) -> Topology:
        """The same nodes seen by a group made of ``ranks``; rank ``i`` there is ``ranks[i]`` here."""
        index = {rank: position for position, rank in enumerate(ranks)}
        kept = (tuple(sorted(index[rank] for rank in node if rank in index)) for node in self.nodes)
        return Topology(tuple(sorted(node for node in kept if node)))


def from_keys(keys: Sequence[str]) -> Topology:
    """Ranks with equal keys share a node. ``keys[rank]``: the :func:`node_key` of that rank."""
    nodes: dict[str, list[int]] = {}
    for rank, key in enumerate(keys):
        nodes.setdefault(key, []).append(rank)
    return Topology(tuple(map(tuple, nodes.values())))


def declared(text: str, size: int) -> Topology:
    """Parse ``--nodes``: ``"2"`` = two ranks on each node, in rank order; ``"0-3,4-7"`` or ``"0,1-2"`` = one entry per
    node."""
    try:
        if text.isdigit():
            per_node = int(text)
            if per_node < 1:
                raise ValueError
            return Topology(tuple(tuple(range(at, min(at + per_node, size))) for at in range(0, size, per_node)))
        nodes = []
        for entry in text.split(","):
            first, dash, last = entry.partition("-")
            # Cut behind the last rank, which is enough to be refused below.
            nodes.append(tuple(range(max(int(first), -1), min(int(last if dash else first), size) + 1)))
    except ValueError:
        raise UsageError(
            f"--nodes {text!r}: give the number of ranks per node (2), or one range of ranks per node (0-3,4-7)"
        ) from None
    if not all(nodes) or sorted(rank for node in nodes for rank in node) != list(range(size)):
        raise UsageError(
            f"--nodes {text!r} does not name each of the ranks 0..{size - 1} exactly once, in ranges that go upwards"
        )
    return Topology(tuple(sorted(nodes)))


def node_key() -> str:
    """A text that is equal on two ranks exactly when they run on one host: host name and the kernel's boot id (two
    machines may both be called ``localhost``; two emulated hosts share a kernel and differ in name)."""
    return f"{socket.gethostname()} {_boot_id()}"


@lru_cache
def _boot_id() -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return boot_id.read_text().strip() if boot_id.exists() else ""


def cores_of_node(keys: Sequence[str], nodes: Sequence[Sequence[int]], rank: int) -> int:
    """Cores that the ranks of ``rank``'s node can keep busy together: a launcher may have bound each of them to some
    only, and a container may have a quota. ``keys``: every rank's :func:`bound_cores`."""
    node = next(node for node in nodes if rank in node)
    cores: set[str] = set()
    quotas: dict[str, float] = {}
    for peer in node:
        bound, quota, group = keys[peer].split(" ", 2)
        cores.update(bound.split(","))
        quotas[group] = float(quota)
    return limits.whole_cores(len(cores), sum(quotas.values()))


def bound_cores() -> str:
    """The cores this process may run on, and its quota of CPU time with the control group that shares it, as text."""
    quota = limits.cpu_quota()
    return f"{','.join(map(str, sorted(limits.own_cores())))} {quota.cores} {quota.group}"


def usable_cores() -> int:
    """Cores that this process can keep busy: its affinity mask, or fewer where a quota limits its time."""
    return limits.usable_cores()
