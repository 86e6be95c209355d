"""Getting connected: a TCP connection between each pair of ranks, whatever interfaces their hosts have.

    1  every rank tells its card (launcher's channel), listens on its addresses, and tells where
    2  rank r connects to all ranks below it: to all their addresses at once, the better ones a moment earlier
    3  a connection counts once both ends have proved that they know the job's key: see :mod:`.meeting`

When all are connected no rank listens any more.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import CommlabError, PeerTimeoutError, UsageError
from .cards import Card, addresses, own_card, require_alike
from .congestion import begin_congestion, require_congestion, settle_congestion
from .meeting import Meeting

Gather = Callable[[bytes], list[bytes]]
"""Everyone's bytes on every rank, in rank order. Collective."""

UNSENT_BYTES = 128 * 1024
"""So much waits in the socket for the network: enough to keep it busy while this rank sleeps, little enough to be in a
cache still when it goes. Without the bound 25 MB took 4 emulated hosts a fifth more processor time (docs/links.md)."""

_TCP_NOTSENT_LOWAT = 25  # the socket module has no name for it


def connect(
    rank: int, gather: Gather, checks: bool = True, iface: str | None = None, timeout_s: float = 30.0
) -> list[int]:
    """The descriptors of connections from this rank to all ranks, in rank order, -1 for itself. Collective.

    ``iface``: the interfaces to use, by name. Where any rank fails, all raise the same errors: UsageError for arguments
    that cannot be, PeerTimeoutError where no address of a peer answered within ``timeout_s``.
    """
    cards = [Card.unpack(card) for card in gather(own_card(rank, checks).pack())]
    require_alike(cards)
    key = hashlib.sha256("".join(card.secret for card in cards).encode()).digest()
    listeners, problem, found = [], "", {}
    try:
        require_congestion()
        others = [card for card in cards if card.rank != rank]
        near = any(card.network == cards[rank].network for card in others)
        beyond = any(card.network != cards[rank].network for card in others)
        listeners = _listen(addresses(iface, near, beyond), len(cards))
    except UsageError as error:
        problem = f"rank {rank}: {error}"
    listens = tuple((str(each.getsockname()[0]), int(each.getsockname()[1])) for each in listeners)
    cards = [Card.unpack(card) for card in gather(replace(cards[rank], listens=listens).pack())]
    meeting = Meeting(rank, cards, key, listeners)
    try:
        _raise_any(gather(problem.encode()), UsageError)
        problem = meeting.run(timeout_s)
        found = meeting.connected
        _raise_any(gather(problem.encode()), PeerTimeoutError)
    except BaseException:
        for connection in found.values():
            connection.close()
        raise
    finally:
        meeting.close()
    for connection in found.values():
        tune(connection, timeout_s)
    return [-1 if peer == rank else found[peer].detach() for peer in range(len(cards))]


def _raise_any(problems: Sequence[bytes], kind: type[CommlabError]) -> None:
    texts = [text.decode() for text in problems if text]
    if texts:
        raise kind("; ".join(texts))


def tune(connection: socket.socket, timeout_s: float) -> None:
    """Small frames leave at once, bursts are not held back, and a peer whose host is gone is noticed: by what is sent
    to it, or else by keep-alives."""
    settle_congestion(connection)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * timeout_s))
    connection.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 5),
        (socket.TCP_KEEPINTVL, max(1, int(timeout_s / 6))),
        (socket.TCP_KEEPCNT, 5),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _listen(candidates: Sequence[object], size: int) -> list[socket.socket]:
    found = []
    for each in candidates:
        host = each.host  # type: ignore[attr-defined]
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            begin_congestion(listener)
            listener.bind((host, 0))
            listener.listen(max(64, size))
            listener.setblocking(False)
            found.append(listener)
        except OSError:  # an address that is still being set up
            listener.close()
    if not found:
        raise UsageError("no interface of this host that is up has an address to listen on; see --iface")
    return found
