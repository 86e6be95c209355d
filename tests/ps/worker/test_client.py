"""A worker's calls: what ends them, how a call follows another, and who is named when nobody answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import commlab
from commlab.errors import PeerTimeoutError, UsageError
from commlab.ps.link import Link
from commlab.ps.messages import Header, Kind
from commlab.ps.worker.client import Client, Message, PendingRequests
from commlab.transport.sim import SimNetwork


class Scripted:
    """A client on rank 0, and servers on the other ranks that answer only when a test has them answer."""

    def __init__(self, servers: int):
        near, *far = SimNetwork(servers + 1).transports()
        self.client = Client(near, range(1, servers + 1), timeout_s=60, crowded=False)
        self.requests: list[list[Header]] = [[] for _ in far]
        self.links = [Link(transport, 0, self._memory_for, self._arrived(at)) for at, transport in enumerate(far)]
        for link in self.links:
            link.listen()

    def _memory_for(self, header: Header) -> torch.Tensor:
        return torch.empty(header.length, dtype=torch.uint8)

    def _arrived(self, server: int) -> Any:
        def arrived(header: Header, _: torch.Tensor) -> None:
            self.requests[server].append(header)
            self.links[server].listen()

        return arrived

    def call(self, what: str, servers: tuple[int, ...] = (0, 1), **options: Any) -> Any:
        messages = [Message(server, (0, 0, 0), Header(Kind.CLOCK)) for server in servers]
        return self.client.submit(PendingRequests(self.client, what, **options), messages)

    def answer(self, server: int, kind: Kind = Kind.ACK, text: str = "") -> None:
        """Answer the oldest open request of a server."""
        while not self.requests[server]:
            self.client.poll()
            self.links[server].poll()
        header = self.requests[server].pop(0)
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else None
        self.links[server].send((0, 0, 0), header._replace(kind=kind, length=len(text)), data)
        for _ in range(10):
            self.links[server].poll()
            self.client.poll()


def test_a_call_ends_with_its_last_answer() -> None:
    seen: list[tuple[int, bool]] = []
    scripted = Scripted(2)
    handle = scripted.call("the call", complete=lambda call: seen.append((call.open, call.finished)), result="result")
    assert isinstance(handle, commlab.Handle) and not handle.done()
    scripted.answer(1)
    assert not handle.done() and not seen
    scripted.answer(0)
    assert handle.done() and handle.wait() == "result"
    assert seen == [(0, False)], "before anybody could see the handle finished"


def test_a_refused_call_waits_for_its_other_answers() -> None:
    scripted = Scripted(2)
    handle = scripted.call("the call", complete=lambda call: pytest.fail("there is an error"))
    scripted.answer(0, Kind.ERROR, "no")
    assert not handle.done()
    scripted.answer(1)
    with pytest.raises(UsageError, match=r"^rank 0: the call was refused by server 0: no$"):
        handle.wait()


def test_a_call_of_no_requests_has_ended() -> None:
    scripted = Scripted(1)
    assert scripted.call("nothing", (), result=7).wait() == 7
    assert scripted.call("nothing after nothing", (), result=8, follows=scripted.call("nothing", ())).wait() == 8


def test_a_call_fails_with_the_call_that_it_follows() -> None:
    """At once, whether or not its own answers ever come."""
    scripted = Scripted(1)
    earlier = scripted.call("push", (0,))
    later = scripted.call("pull", (0,), follows=earlier, complete=lambda call: pytest.fail("it has failed"))
    scripted.answer(0, Kind.ERROR, "twice")
    with pytest.raises(UsageError, match="push was refused by server 0: twice"):
        later.wait()
    scripted.answer(0)
    with pytest.raises(UsageError, match="push was refused"):
        later.wait()
    follower = scripted.call("pull", (0,), follows=earlier)
    assert follower.done(), "of a call that had failed before"


def test_who_has_not_answered_is_named() -> None:
    scripted = Scripted(3)
    handle = scripted.call("push of 'w' at clock 3", (0, 1, 2))
    scripted.answer(1)
    text = r"^rank 0 has waited \d+\.\d s for server ranks 1, 3 in push of 'w' at clock 3; it may be stuck or slow: see"
    with pytest.raises(PeerTimeoutError, match=text):
        handle.wait(timeout_s=0.05)
    scripted.answer(0)
    with pytest.raises(PeerTimeoutError, match="for server rank 3 in push"):
        handle.wait(timeout_s=0.05)
    pulled = scripted.call("pull of 'w' at clock 4", (2,), follows=handle)
    with pytest.raises(PeerTimeoutError, match="for server rank 3 in push"):
        pulled.wait(timeout_s=0.05)
    scripted.answer(2)
    with pytest.raises(PeerTimeoutError, match="for server rank 3 in pull"):
        pulled.wait(timeout_s=0.05)
    scripted.answer(2)
    pulled.wait()
