"""How a queue of operations ends, and what its later callers are told."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import AgreedError, CommlabError, DisagreementError, PeerLostError, PeerTimeoutError

HARMLESS = (DisagreementError, AgreedError)
"""Errors that end no queue: all ranks have raised them, before anything was sent."""

kept: list[object] = []
"""Operations that broke off, with their buffers: messages that peers still send may arrive there."""


class Ending(NamedTuple):
    """Why a queue takes no more operations: the class and the text of what a caller is told."""

    kind: type[CommlabError]
    text: str

    def error(self, what: str, rank: int) -> CommlabError:
        """The error for a caller who asks for ``what``."""
        return self.kind(f"rank {rank}: {what} on a group that {self.text}")


def ended_by(error: BaseException, what: str) -> Ending:
    """The ending of a queue by an ``error`` in the operation ``what``."""
    classes = (PeerLostError, PeerTimeoutError)
    kind = next((each for each in classes if isinstance(error, each)), CommlabError)
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Ending(
        kind,
        f"was ended by an error in {what} ({said}). Ranks may be at different operations since then; "
        "end the job, or call commlab.shutdown() and commlab.init() on every rank",
    )
