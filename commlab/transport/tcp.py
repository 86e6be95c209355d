"""Transport over links: one TCP connection between each pair of ranks, and one native thread that moves all groups'
bytes over them, asleep in the kernel until there is something to do (kernels/links).

Beside messages it runs whole operations by itself: a :class:`.base.Offload` announces what the rank is about to do,
compares the announcements, and then runs a program or reduces few numbers, without Python. How the ranks get connected
is in :mod:`.handshake`; docs/links.md has the reasons and the figures.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..errors import CommlabError, DisagreementError, PeerLostError
from ..native.library import built
from .base import PIGGYBACK_RANKS, Bytes, Contexts, Exchange, Offload, Piggyback, Transport

log = logging.getLogger("commlab")

LINKS_BYTES: Final = 64 * 1024
"""The most that travels to each peer in one frame with a record."""

BYTE_S: Final = 8e-9
"""What a byte takes between two nodes where nobody has measured it: 1 Gbit/s."""

LOOK_S: Final = 200e-6
"""A wait that is over sooner is not slept through: to be woken takes a sleeper as long as the answer to a small message
takes. How long a wait really looks is learned from those before (kernels/cpu/look.h)."""

KEEPER: Final = "COMMLAB_KEEPER"
"""The environment variable that turns off, with ``off``, the process that keeps a killed rank's memory until its
connections are closed: for schedulers that add up the memory of a job's processes, which counts this memory twice."""

_PENDING, _DONE, _DISAGREE, _LOST, _MISMATCH = range(5)
"""What a native run says of itself: ``Status`` in kernels/links/run.h."""


def missing_reason() -> str:
    """Why this process can have no links; empty if it can."""
    if built is None:
        return "the native module is not built"
    return "" if hasattr(built, "LinksEngine") else "links need Linux"


def keeps_memory() -> bool:
    """Whether this process, if it is killed, keeps its memory until its connections are closed (see :data:`KEEPER`). A
    value that means nothing is warned of, and is ``on``."""
    value = os.environ.get(KEEPER) or "on"
    if value not in ("on", "off"):
        log.warning("%s=%r means nothing: there are on (the default) and off", KEEPER, value)
    return value != "off"


class TcpRequest:
    """A run of the engine: a message, an exchange of records, or an operation."""

    __slots__ = ("_run", "_transport")

    def __init__(self, transport: TcpTransport, run: Any):
        self._transport, self._run = transport, run

    def test(self) -> bool:
        status = self._run.status()
        if status <= _DISAGREE:
            return bool(status != _PENDING)
        raise self._transport.failure_of(status, *self._run.failure())

    def block(self, timeout_s: float) -> None:
        """Help the engine, without the GIL, until the run has ended or ``timeout_s`` are over."""
        self._run.wait(timeout_s)

    def peers(self) -> Sequence[int]:
        found: list[int] = self._run.peers()
        return found


class OffloadRequest(TcpRequest):
    """A :class:`.base.Offload` under way; like an :class:`.base.Exchange` it knows whether the ranks agree."""

    __slots__ = ()

    def agreed(self, record: bytes) -> bool:
        """Whether all ranks announced the operation; if not, nothing was moved."""
        return bool(self._run.status() != _DISAGREE)


class TcpExchange(Exchange):
    """Everyone's records, in one native run."""

    __slots__ = ("_request", "_run")

    def __init__(self, transport: TcpTransport, run: Any):
        self.size, self._run = transport.size, run
        self._request = TcpRequest(transport, run)

    def test(self) -> bool:
        return self._request.test()

    def block(self, timeout_s: float) -> None:
        self._request.block(timeout_s)

    def peers(self) -> Sequence[int]:
        return self._request.peers()

    def agreed(self, record: bytes) -> bool:
        return bool(self._run.records() == record * self.size)

    def records(self) -> list[bytes]:
        everything: bytes = self._run.records()
        width = len(everything) // self.size
        return [everything[rank * width : (rank + 1) * width] for rank in range(self.size)]


class Links:
    """The connections of this process to all other ranks of the job, and the engine that runs them.

    ``descriptors``: a connected socket to each rank, -1 for ``rank`` itself; they belong to the engine from now on.
    ``checks``: payloads carry a CRC32C, on all ranks or none. ``look_s``: so long at most a caller that waits looks
    again at once before it sleeps. ``launched``: the transport of the launcher, which ends the job and is closed with
    the links. ``shared``: they end with the last of their transports; else with the transport of all ranks.
    A killed rank's connections close before its memory is taken down, unless :data:`KEEPER` says no.
    """

    def __init__(
        self,
        rank: int,
        descriptors: Sequence[int],
        checks: bool = True,
        look_s: float = LOOK_S,
        launched: Transport | None = None,
        shared: bool = False,
    ):
        assert built is not None
        self.engine = built.LinksEngine(rank, list(descriptors), checks, look_s * 1e6, keeps_memory())
        self.rank, self.size, self._launched = rank, len(descriptors), launched
        self.contexts = Contexts(2**30)
        self.byte_s = BYTE_S
        """What a byte takes between two nodes, equal on all ranks: whoever has measured it says it here."""
        self.closed = False
        self._open: set[int] | None = set() if shared else None

    def world(self) -> TcpTransport:
        """The transport of all ranks."""
        return TcpTransport(self, range(self.size), 0)

    def opened(self, group: int) -> None:
        """A transport uses the links from now on."""
        if self._open is not None:
            self._open.add(group)

    def released(self, group: int, orderly: bool) -> None:
        """A transport is closed."""
        if self._open is not None:
            self._open.discard(group)
        if not self.closed and (group == 0 if self._open is None else not self._open):
            self.close(orderly)

    def among(self, ranks: Sequence[int], context: int) -> TcpTransport:
        """The transport of ``ranks`` of the job, this one among them; ``context``: as in :meth:`TcpTransport.split`,
        agreed on by these ranks alone."""
        self.contexts.take(context, self.rank)
        return TcpTransport(self, ranks, context)

    def abort(self, code: int) -> None:
        if self._launched is not None:
            self._launched.abort(code)
        os._exit(code)

    def let_go(self) -> None:
        """The interpreter ends: threads of the launcher's transport must not wait for anybody."""
        let_go = getattr(self._launched, "let_go", None)
        if let_go is not None:
            let_go()

    def close(self, orderly: bool) -> None:
        """Leave in good order: what was sent still arrives, and peers that wait for more are told. Not ``orderly``:
        nobody is waited for."""
        self.closed = True
        self.engine.leave(1.0 if orderly else 0.0)
        if self._launched is not None:
            self._launched.close(orderly)


class TcpTransport:
    """Ranks of a group over links. ``ranks``: the group's ranks as the job numbers them. ``group``: a number that no
    other group of any of these ranks has."""

    name = "tcp"
    threads = True
    moves_itself = True

    def __init__(self, links: Links, ranks: Sequence[int], group: int):
        self._links, self._engine, self._ranks, self._group = links, links.engine, tuple(ranks), group
        self.rank, self.size = self._ranks.index(links.rank), len(self._ranks)
        self.piggyback_bytes = LINKS_BYTES if 1 < self.size <= PIGGYBACK_RANKS else 0
        self.programs: dict[tuple[Any, ...], Any] = {}
        """Native programs by what they were compiled from."""
        self._nothing = built.LinksOperand(0, 0, 0, 0, 1.0, False, 0, 0, 0, False)
        self.contexts = links.contexts
        self._engine.add_group(group, list(self._ranks))
        links.opened(group)
        self._removed = weakref.finalize(self, self._engine.remove_group, group)
        self._removed.atexit = False

    @property
    def byte_s(self) -> float:
        """What a byte takes between two nodes; equal on all ranks."""
        return self._links.byte_s

    def isend(self, data: Bytes, to: int) -> TcpRequest:
        return self._message(data, to, sends=True)

    def irecv(self, data: Bytes, frm: int) -> TcpRequest:
        return self._message(data, frm, sends=False)

    def _message(self, data: Bytes, peer: int, sends: bool) -> TcpRequest:
        return TcpRequest(self, self._engine.message(self._group, peer, data.ctypes.data, data.size, sends, data))

    def exchange(self, record: bytes, piggyback: Piggyback | None = None) -> TcpExchange:
        assert piggyback is None, "few numbers are launched"
        return TcpExchange(self, self._engine.exchange(self._group, record, True))

    def launch(self, record: bytes, launch: Offload | None) -> OffloadRequest:
        """Announce an operation, and run it once all ranks have announced it. Collective; the operations of a group
        run in the order of these calls. ``launch``: None where there is nothing behind the announcement."""
        if launch is None:
            return OffloadRequest(self, self._engine.launch(self._group, record, None, None, self._nothing, None, True))
        run = self._engine.launch(
            self._group, record, launch.few, launch.program, launch.operand, launch.keep, launch.awaited
        )
        return OffloadRequest(self, run)

    def few(self, *arguments: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The native call of an :class:`.base.AtOnce`, and what it is given. ``arguments``: how many numbers, the codes
        of their dtype and of the reduction, the divisor, the bytes to each peer, whether each gets another share."""
        return self._engine.allreduce_few, (self._group, *arguments)

    def leaders(
        self,
        between: TcpTransport | None,
        nodes: Sequence[Sequence[int]],
        node: Sequence[int],
        sync: Any,
        areas: Sequence[int],
        area_bytes: int,
        spin_us: float,
        late_us: float,
    ) -> Any:
        """The native side of :class:`commlab.runtime.leaders.Leaders`, whose arguments these are; ``node``: the ranks
        of this rank's node, ``sync``: that of its window. From now on few numbers of this group are added node by
        node."""
        self._engine.set_nodes(self._group, [list(ranks) for ranks in nodes])
        group = 0 if between is None else between._group
        members = [self._ranks[rank] for rank in node]
        me = node.index(self.rank)
        return self._engine.leaders(self._group, group, members, me, sync, areas, area_bytes, spin_us, late_us)

    def number_of(self, job_rank: int) -> int:
        """The rank of this group that is ``job_rank`` of the job."""
        return self._ranks.index(job_rank)

    def resumed(self, run: Any, keep: Any) -> OffloadRequest:
        """What such a call has begun. ``keep``: the tensor."""
        run.hold(keep)
        return OffloadRequest(self, run)

    def split(self, ranks: Sequence[int], context: int, *, any_order: bool = False) -> TcpTransport | None:
        self.contexts.take(context, self.rank)
        return TcpTransport(self._links, [self._ranks[rank] for rank in ranks], context) if self.rank in ranks else None

    def beside(self) -> TcpTransport:
        return TcpTransport(self._links, self._ranks, self.contexts.beside(self._group))

    def failure_of(self, status: int, job_rank: int, text: str) -> CommlabError:
        """The error for a run that ended with ``status``."""
        if status == _LOST:
            rank = self.number_of(job_rank)
            lost = PeerLostError(f"the links lost rank {rank}: {text}")
            lost.rank = rank
            return lost
        if status == _MISMATCH:
            return DisagreementError(f"rank {self.rank}: ranks disagree on sizes: {text}")
        return CommlabError(f"rank {self.rank}: {text}")

    def abort(self, code: int) -> None:
        self._links.abort(code)

    def let_go(self) -> None:
        """See :meth:`Links.let_go`."""
        self._links.let_go()

    def close(self, orderly: bool = True) -> None:
        """Release the group; with the group of all ranks, or the last, the links are closed."""
        self._removed()
        self._links.released(self._group, orderly)
