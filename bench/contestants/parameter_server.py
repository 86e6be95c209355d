"""The contestants of :mod:`bench.ps`: who takes part in a session of push and pull, and the numbers that a session must
lead to."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

import commlab
from commlab.native.dtypes import WIRES
from commlab.ps.placement import server_ranks

from . import floor

Session = Callable[[int], tuple[float, int]]
"""Takes a number of clocks; returns the seconds of one clock on this rank (0 on a server), and how many numbers are
wrong. Collective."""


def pushed(worker: int, numel: int) -> torch.Tensor:
    """Integers that 16 bits hold, different for every worker and index."""
    return (torch.arange(numel) % 97 + worker + 1).float()


def expected(clocks: int, workers: int, numel: int, wire: torch.dtype | None) -> torch.Tensor:
    """The value of the tensor, which is -3 at first, after ``clocks`` updates by the mean of all workers' pushes: exact
    in fp32, then rounded once."""
    value = (torch.arange(numel) % 97 + (workers + 1) / 2) * clocks - 3
    return value.float() if wire is None else value.to(wire).float()


class Roles(NamedTuple):
    """The ranks that take part in a session; the other ranks rest."""

    workers: tuple[int, ...]
    servers: tuple[int, ...]

    def link_bytes(self, nodes: Sequence[Sequence[int]], size_bytes: float) -> float:
        """How many bytes the busiest host sends, or takes in: a tensor of ``size_bytes`` from every worker, spread
        evenly over the servers, and as much back."""
        host = {rank: at for at, node in enumerate(nodes) for rank in node}
        pairs = [(host[worker], host[server]) for worker in self.workers for server in self.servers]
        sent = Counter(end for pair in pairs if pair[0] != pair[1] for end in pair)
        return max(sent.values(), default=0) * size_bytes / len(self.servers)


def roles(nodes: Sequence[Sequence[int]], servers: int, most: int) -> Roles:
    """The roles of a session with ``servers`` servers. ``most``: the number of servers of the session that has most of
    them; the workers of that session work in all sessions."""
    size = sum(map(len, nodes))
    resting = server_ranks(nodes, most)
    return Roles(tuple(rank for rank in range(size) if rank not in resting), server_ranks(nodes, servers))


def parameter_server(world: commlab.Group, who: Roles, numel: int, wire: str | None, clocks: int) -> tuple[float, int]:
    """One session with ``commlab.ParameterServer``: one clock to warm up, then ``clocks``."""
    everyone = world.subgroup(sorted(who.workers + who.servers))
    if everyone is None:
        return 0.0, 0
    value = torch.full((numel,), -3.0)
    store = commlab.ParameterServer([("value", value)], servers=len(who.servers), group=everyone, wire=wire)
    spent_s, wrong = 0.0, 0
    if store.role == "worker":
        own, workers = pushed(store.group.rank, numel), store.group.size

        def clock() -> None:
            handle = store.push_pull("value", own, value)
            store.step()
            handle.wait()

        clock()
        store.group.barrier()
        started_s = time.perf_counter()
        for _ in range(clocks):
            clock()
        spent_s = (time.perf_counter() - started_s) / clocks
        wrong = int((value != expected(clocks + 1, workers, numel, WIRES[wire])).sum())
    everyone.close()
    return spent_s, wrong


def messages(who: Roles, numel: int, clocks: int) -> tuple[float, int]:
    """One session of bare MPI messages: the server takes a tensor from every worker, and sends the tensor back."""
    from mpi4py import MPI

    comm: Any = MPI.COMM_WORLD
    [server] = who.servers
    if comm.rank not in (server, *who.workers):
        return 0.0, 0
    peers = who.workers if comm.rank == server else who.servers
    out = [pushed(comm.rank, numel).numpy() for _ in peers]
    back = [torch.full((numel,), -1.0).numpy() for _ in peers]

    def clock() -> None:
        taking = [comm.Irecv(numbers, peer) for peer, numbers in zip(peers, back, strict=True)]
        if comm.rank == server:
            arrived = [MPI.Request.Waitany(taking) for _ in peers]
            MPI.Request.Waitall([comm.Isend(back[at], peers[at]) for at in arrived])
        else:
            giving = [comm.Isend(numbers, peer) for peer, numbers in zip(peers, out, strict=True)]
            MPI.Request.Waitall(taking + giving)

    clock()
    started_s = time.perf_counter()
    for _ in range(clocks):
        clock()
    spent_s = (time.perf_counter() - started_s) / clocks
    wanted = [pushed(peer if comm.rank == server else comm.rank, numel) for peer in peers]
    wrong = sum(int((torch.from_numpy(got) != want).sum()) for got, want in zip(back, wanted, strict=True))
    return spent_s, wrong


def copied(rank: int, who: Roles, way: Callable[[int, int, int], None], numel: int, clocks: int) -> tuple[float, int]:
    """One session of copies: all ranks copy at once what they have to take in, a worker one tensor, the server a tensor
    of every worker."""
    if rank not in who.workers + who.servers:
        return 0.0, 0
    tensors = len(who.workers) if rank in who.servers else 1
    source, target = pushed(rank, numel * tensors), torch.full((numel * tensors,), -1.0)
    to, frm, size_bytes = target.data_ptr(), source.data_ptr(), 4 * numel * tensors
    way(to, frm, size_bytes)
    started_s = time.perf_counter()
    for _ in range(clocks):
        way(to, frm, size_bytes)
    return (time.perf_counter() - started_s) / clocks, int((target != source).sum())


class PushPull(NamedTuple):
    """One way to bring a tensor of every worker to the servers and back."""

    session: Session
    kind: str
    who: Roles
    wire_bytes: float = 1.0
    """Bytes on the wire per byte of the tensor."""


def contestants(world: commlab.Group, numel: int, options: argparse.Namespace) -> dict[str, PushPull]:
    """All contestants by name. ContestantMissing where the floor cannot be compiled."""
    found: dict[str, PushPull] = {}
    most = max(options.servers)
    for servers in options.servers:
        who = roles(world.nodes, servers, most)
        for wire in options.wires:
            name = f"commlab, {servers} server{'s' * (servers > 1)}" + (f", wire {wire}" if wire != "none" else "")
            session = partial(parameter_server, world, who, numel, None if wire == "none" else wire)
            found[name] = PushPull(session, "commlab", who, 1.0 if wire == "none" else 0.5)
    one = roles(world.nodes, 1, most)
    found["MPI messages, 1 server"] = PushPull(partial(messages, one, numel), "peer", one)
    for name, way in floor.load().items():
        found[f"copy, {name}"] = PushPull(partial(copied, world.rank, one, way, numel), "floor", one)
    return found
