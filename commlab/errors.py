"""The kinds of failure. Every message names rank, peer, operation and tensor where they exist, both sides of a
disagreement, and what to do."""

from __future__ import annotations


class CommlabError(RuntimeError):
    """Base of every error that commlab raises on purpose."""


class UsageError(CommlabError, ValueError):
    """The caller asked for something that cannot be; found on this rank alone, before anything is sent."""


class AgreedError(UsageError):
    """A UsageError that every rank of the group has raised: nobody waits for anybody."""


class DisagreementError(CommlabError):
    """Ranks of one group called different operations, or the same one with different tensors. Raised on every rank,
    before anything is reduced. The group can be used again."""


class RefusedError(AgreedError, DisagreementError):
    """Some ranks gave arguments that cannot be. Raised on every rank of the group, with those ranks' reasons, before
    anything is reduced. The group can be used again."""


class NotFiniteError(CommlabError, ArithmeticError):
    """A step's gradient, its norm or a loss is inf or NaN, on any rank. Raised on every rank, before anything is
    updated; the step is dropped, and the next one may begin."""


class PeerLostError(CommlabError, ConnectionError):
    """A peer's process or its connection is gone."""

    rank: int | None = None
    """The peer's rank in the group, where the transport knows at once who is lost, as links do."""


class PeerTimeoutError(CommlabError, TimeoutError):
    """A peer lives, as far as is known, but has not answered within the timeout."""


class SharedMemoryError(CommlabError, MemoryError):
    """Memory that the ranks of a node share can't be had: none is left, or a peer's can't be opened. Found before
    anything of it is touched."""
