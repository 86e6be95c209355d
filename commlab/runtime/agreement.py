"""What a rank says it is about to do, and the check that precedes every operation: ranks compare what they are about to
do before anything is reduced, eight bytes each way when they agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from ..errors import DisagreementError
from ..transport.base import Offload, Pending, Piggyback, Request, Transport
from ..window.exchange import Attachment, WindowExchange
from ..window.memory import Window

TEXT_BYTES = 512
_ODD = 0x9E3779B97F4A7C15  # any odd number: multiplying by it maps sequence numbers to distinct 64-bit words


@dataclass(frozen=True)
class Signature:
    """One operation on one tensor, as far as ranks have to agree on it.

    Two unnamed tensors of equal shape and dtype that two ranks use in swapped order look the same here; named ones do
    not.
    """

    kind: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    name: str | None = None
    detail: str = ""
    """What else must agree: the reduction, root, algorithm and wire."""

    def __post_init__(self) -> None:
        digest = blake2b(repr((self.kind, self.shape, self.dtype, self.name, self.detail)).encode(), digest_size=8)
        object.__setattr__(self, "_hash", int.from_bytes(digest.digest(), "little"))

    def number(self, sequence: int) -> int:
        """64 bits that are equal exactly (but for a hash collision, 2^-64) when the signature and the place in order
        are."""
        mixed: int = self._hash ^ (sequence * _ODD)  # type: ignore[attr-defined]
        return mixed & 0xFFFFFFFFFFFFFFFF

    def record(self, sequence: int) -> bytes:
        """The same as eight bytes."""
        return self.number(sequence).to_bytes(8, "little")

    def text(self, sequence: int) -> str:
        what = f"{self.kind} #{sequence}"
        if self.name is not None:
            what += f" {self.name!r}"
        if self.dtype is not None:
            what += f" of {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"
        return f"{what} ({self.detail})" if self.detail else what

    def padded_text(self, sequence: int) -> bytes:
        return self.text(sequence).encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")


class Agreement:
    """The check of one group's operations. ``required``: whether ranks compare all that they do; with a window they
    always do, because the same exchange tells where the data lie."""

    def __init__(self, transport: Transport, required: bool):
        self._transport, self.required = transport, required
        self.window: Window | None = None
        """Memory of the group's ranks, once they share one: records travel through its control pages."""

    def before(
        self,
        signature: Signature,
        sequence: int,
        body: Iterable[Request],
        attached: Callable[[], Attachment | Piggyback | Offload | None],
    ) -> Pending:
        """``body``, once all ranks are known to agree on ``signature``. ``attached()``: what this rank publishes in the
        window, or what travels with its record, or follows it; asked for just before the others are told.
        DisagreementError on every rank where they do not agree."""
        checked = self.required or self.window is not None or signature.kind in ("barrier", "subgroup")
        if checked and self._transport.size > 1:
            record = signature.record(sequence)
            exchange = self._announce(record, attached())
            while not exchange.test():
                yield exchange
            if not exchange.agreed(record):
                texts = self._transport.exchange(signature.padded_text(sequence))
                while not texts.test():
                    yield texts
                raise DisagreementError(disagreement(texts.records(), self._transport.rank))
        yield from body

    def _announce(self, record: bytes, brought: Attachment | Piggyback | Offload | None) -> Any:
        if isinstance(brought, Offload):
            # Returns when the whole operation has ended: the body finds it done.
            brought.request = request = self._transport.launch(record, brought)  # type: ignore[attr-defined]
            return request
        if self.window is None or isinstance(brought, Piggyback):
            return self._transport.exchange(record, brought if isinstance(brought, Piggyback) else None)
        return WindowExchange(self.window, int.from_bytes(record, "little"), brought)


def disagreement(records: Sequence[bytes], rank: int) -> str:
    """The message for a disagreement: all the sides, each with its ranks."""
    sides: dict[str, list[int]] = {}
    for peer, record in enumerate(records):
        sides.setdefault(record.rstrip(b"\0").decode(errors="replace"), []).append(peer)
    listed = "; ".join(f"rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)}: {text}" for text, ranks in sides.items())
    return (
        f"ranks disagree (seen on rank {rank}): {listed}. Nothing was reduced. Every rank of the "
        "group must call the same "
        "operations, in the same order, with the same name, shape, dtype and arguments"
    )


def _ranges(ranks: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
