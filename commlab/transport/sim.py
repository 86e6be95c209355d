"""Transport ``sim``: P ranks as mailboxes inside one process, driven by one thread. For tests, docs and the simulator.

It is stricter than real networks. A send is done only when its receive has been posted, and its memory is read only
then, so a schedule that relies on buffering, or overwrites what is still to be sent, gives a deadlock or a wrong result
here. It fails on a deadlock (nobody can go on) and on a message that nobody read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from .base import Bytes, Contexts, Exchange, Piggyback


class SimRequest:
    __slots__ = ("data", "done", "peer")

    def __init__(self, data: Bytes, peer: int):
        self.data, self.peer, self.done = data, peer, False

    def test(self) -> bool:
        return self.done

    def peers(self) -> Sequence[int]:
        return (self.peer,)


class SimNetwork:
    """The mailboxes between ``size`` ranks, and how many messages and bytes went through them."""

    def __init__(self, size: int):
        self.size = size
        # Per directed pair: sends without a receive, or receives without a send, oldest first; one of the two is empty.
        self._sends: dict[tuple[int, int], deque[SimRequest]] = {}
        self._receives: dict[tuple[int, int], deque[SimRequest]] = {}
        self.messages: list[tuple[int, int, int]] = []
        """Every message sent: (from, to, bytes), in the order of sending."""

    def transports(self) -> list[SimTransport]:
        return [SimTransport(self, rank) for rank in range(self.size)]

    def post(self, frm: int, to: int, data: Bytes, sending: bool) -> SimRequest:
        """Post one side of a message; it moves as soon as the other side is there."""
        request = SimRequest(data, to if sending else frm)
        mine, theirs = (self._sends, self._receives) if sending else (self._receives, self._sends)
        if sending:
            self.messages.append((frm, to, data.size))
        partners = theirs.setdefault((frm, to), deque())
        if not partners:
            mine.setdefault((frm, to), deque()).append(request)
            return request
        partner = partners.popleft()
        source, target = (data, partner.data) if sending else (partner.data, data)
        if source.size != target.size:
            raise RuntimeError(f"rank {frm} sends {source.size} B, rank {to} expects {target.size} B")
        target[:] = source
        request.done = partner.done = True
        return request

    def run(self, ranks: Iterable[Generator[Any, None, Any]]) -> list[Any]:
        """Drive one generator per rank, round robin, until all have returned; returns their results in rank order.

        A generator yields the request that it waits for. RuntimeError on a deadlock, naming who waits for whom, and on
        messages that nobody read.
        """
        running = dict(enumerate(ranks))
        waiting: dict[int, Any] = {}
        results: list[Any] = [None] * len(running)
        while running:
            moved = False
            for rank in list(running):
                if rank in waiting and not waiting[rank].test():
                    continue
                moved = True
                try:
                    waiting[rank] = next(running[rank])
                except StopIteration as stop:
                    results[rank] = stop.value
                    del running[rank]
                    waiting.pop(rank, None)
            if not moved:
                who = ", ".join(f"rank {rank} waits for {list(waiting[rank].peers())}" for rank in running)
                raise RuntimeError(f"deadlock: {who}")
        unread = [f"{frm} -> {to}: {len(box)}" for (frm, to), box in self._sends.items() if box]
        if unread:
            raise RuntimeError(f"messages that nobody read: {', '.join(unread)}")
        return results


class SimTransport:
    """One rank of a :class:`SimNetwork`."""

    name = "sim"
    moves_itself = False
    threads = False
    piggyback_bytes = 0

    def __init__(
        self,
        network: SimNetwork,
        rank: int,
        ranks: Sequence[int] | None = None,
        context: int = 0,
        contexts: Contexts | None = None,
    ):
        """``ranks``: of the network, by rank of the transport; all of them where that is None."""
        self._network, self.rank = network, rank
        self._ranks = range(network.size) if ranks is None else ranks
        self.size = len(self._ranks)
        self.contexts = Contexts(2**30) if contexts is None else contexts
        self._context = context
        # Mailboxes of a context have numbers of their own.
        self._boxes = [context * network.size + at for at in self._ranks]

    def isend(self, data: Bytes, to: int) -> SimRequest:
        request = self._network.post(self._boxes[self.rank], self._boxes[to], data, sending=True)
        request.peer = to
        return request

    def irecv(self, data: Bytes, frm: int) -> SimRequest:
        request = self._network.post(self._boxes[frm], self._boxes[self.rank], data, sending=False)
        request.peer = frm
        return request

    def exchange(self, record: bytes, piggyback: Piggyback | None = None) -> Exchange:
        assert piggyback is None
        return Exchange(self, record)

    def split(self, ranks: Sequence[int], context: int, *, any_order: bool = False) -> SimTransport | None:
        self.contexts.take(context, self.rank)
        if self.rank not in ranks:
            return None
        mine = [self._ranks[rank] for rank in ranks]
        return SimTransport(self._network, list(ranks).index(self.rank), mine, context, self.contexts)

    def beside(self) -> SimTransport:
        context = self.contexts.beside(self._context)
        return SimTransport(self._network, self.rank, self._ranks, context, self.contexts)

    def abort(self, code: int) -> None:
        raise SystemExit(code)

    def close(self, orderly: bool = True) -> None:
        pass
