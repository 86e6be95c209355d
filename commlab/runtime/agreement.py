"""What a rank says it is about to do, and the check that precedes every operation: ranks compare what they are about to
do before anything is reduced, eight bytes each way when they agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch

from ..errors import AgreedError, DisagreementError, RefusedError, UsageError
from ..transport.base import Offload, Pending, Piggyback, Request, Transport
from ..window.exchange import NOTHING, Attachment, WindowExchange
from ..window.memory import Window

TEXT_BYTES = 64 * 1024
"""The most that a rank tells of an operation. A longer text ends with a digest of itself."""
SHOWN = 480
"""So many characters of each side a message shows: of longer ones the beginning, and the place where they differ."""
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
    refusal: str = ""
    """Why this rank can't do the operation, for the other ranks to know; empty where it can."""
    hash: int = field(init=False, compare=False, repr=False)
    """64 bits of all of it."""

    def __post_init__(self) -> None:
        digest = blake2b(
            repr((self.kind, self.shape, self.dtype, self.name, self.detail, self.refusal)).encode(), digest_size=8
        )
        object.__setattr__(self, "hash", int.from_bytes(digest.digest(), "little"))

    def number(self, sequence: int) -> int:
        """64 bits that are equal exactly (but for a hash collision, 2^-64) when the signature and the place in order
        are."""
        mixed: int = self.hash ^ (sequence * _ODD)
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
        if self.detail:
            what += f" ({self.detail})"
        return f"{what}, refused: {self.refusal}" if self.refusal else what

    def reply(self, sequence: int) -> bytes:
        """What this rank tells the others where they disagree: whether it refuses, and its side as text."""
        text = self.text(sequence).encode(errors="backslashreplace")
        if len(text) > TEXT_BYTES:
            text = text[:TEXT_BYTES] + f"... (digest {blake2b(text, digest_size=8).hexdigest()})".encode()
        return (b"!" if self.refusal else b" ") + text


class Agreement:
    """The check of one group's operations. ``required``: whether ranks compare all that they do; with a window they
    always do, because the same exchange tells where the data lie."""

    def __init__(self, transport: Transport, required: bool):
        self._transport, self.required = transport, required
        self.window: Window | None = None
        """Memory of the group's ranks, once they share one: records travel through its control pages."""

    @property
    def checks(self) -> bool:
        """Whether ranks compare all that they do."""
        return self.required or self.window is not None

    def before(
        self,
        signature: Signature,
        sequence: int,
        body: Iterable[Request],
        attached: Callable[[], Attachment | Piggyback | Offload | None],
    ) -> Pending:
        """``body``, once all ranks are known to agree on ``signature``. ``attached()``: what this rank publishes in the
        window, or what travels with its record, or follows it; asked for just before the others are told. Where they
        do not agree, DisagreementError on every rank; where a rank's signature is a refusal, or its ``attached()``
        fails, RefusedError on every rank, or AgreedError where all refuse for one reason."""
        checked = self.checks or signature.kind in ("barrier", "subgroup")
        if checked and self._transport.size > 1:
            cause: Exception | None = None
            try:
                brought = attached()
            except Exception as error:
                # Nobody knows yet; nobody has to wait for what this rank can't bring.
                cause, brought = error, NOTHING
                signature = replace(signature, refusal=refusal_of(error, self._transport.rank))
            record = signature.record(sequence)
            exchange = self._announce(record, sequence, brought)
            while not exchange.test():
                yield exchange
            rank = self._transport.rank
            if not exchange.agreed(record):
                reply = signature.reply(sequence)
                lengths = self._transport.exchange(len(reply).to_bytes(8, "little"))
                while not lengths.test():
                    yield lengths
                longest = max(int.from_bytes(length, "little") for length in lengths.records())
                texts = self._transport.exchange(reply.ljust(longest, b"\0"))
                while not texts.test():
                    yield texts
                raise disagreement(texts.records(), rank) from cause
            if signature.refusal:
                raise AgreedError(f"rank {rank}: {signature.refusal}") from cause
        yield from body

    def _announce(self, record: bytes, sequence: int, brought: Attachment | Piggyback | Offload | None) -> Any:
        if self._transport.moves_itself and self.window is None:
            # Launches keep the order of the calls, whatever is moved in Python: so every announcement is one.
            launch = brought if isinstance(brought, Offload) else None
            if launch is not None and launch.request is not None:
                return launch.request
            announced = record + sequence.to_bytes(8, "little")
            request = self._transport.launch(announced, launch)  # type: ignore[attr-defined]
            if launch is not None:
                # Returns when the whole operation has ended: the body finds it done.
                launch.request = request
            return request
        assert not isinstance(brought, Offload), "only a transport that moves itself is given one"
        if self.window is None or isinstance(brought, Piggyback):
            return self._transport.exchange(record, brought if isinstance(brought, Piggyback) else None)
        return WindowExchange(self.window, int.from_bytes(record, "little"), brought)


def refusal_of(error: Exception, rank: int) -> str:
    """The reason for a refusal as all ranks are told: without this rank's number, which they know."""
    text = str(error).removeprefix(f"rank {rank}: ")
    return text if isinstance(error, UsageError) and text else f"{type(error).__name__}: {text}"


def disagreement(replies: Sequence[bytes], rank: int) -> DisagreementError:
    """The error for a disagreement: all the sides, each with its ranks."""
    sides: dict[str, list[int]] = {}
    for peer, side in enumerate(replies):
        sides.setdefault(side[1:].rstrip(b"\0").decode(errors="replace"), []).append(peer)
    listed = "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)}: {text}"
        for text, ranks in zip(_shown(list(sides)), sides.values(), strict=True)
    )
    if any(side[:1] == b"!" for side in replies):
        return RefusedError(f"not every rank can do this (seen on rank {rank}): {listed}. Nothing was reduced")
    return DisagreementError(
        f"ranks disagree (seen on rank {rank}): {listed}. Nothing was reduced. Every rank of the "
        "group must call the same "
        "operations, in the same order, with the same name, shape, dtype and arguments"
    )


def _shown(texts: list[str]) -> list[str]:
    """Texts cut to what a reader wants to see of them: the beginning, and the place from which on they differ."""
    shortest = min(map(len, texts))
    differ = next((at for at in range(shortest) if len({text[at] for text in texts}) > 1), shortest)
    start = max(0, min(differ - SHOWN // 4, shortest - SHOWN // 2))
    shown = []
    for text in texts:
        if len(text) > SHOWN:
            head, stop = SHOWN // 3, start + SHOWN // 2
            kept = text[:stop] if start <= head else f"{text[:head]} ... {text[start:stop]}"
            text = kept + (" ..." if stop < len(text) else "")
        shown.append(text)
    return shown


def _ranges(ranks: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
