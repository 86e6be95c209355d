"""What all ranks of a group come to know: small records of each, and errors that any of them has had."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from ..errors import AgreedError, UsageError
from ..transport.base import Pending
from ..window import loops
from ..window.exchange import Attachment
from ..window.memory import Window
from .agreement import Signature
from .group import Group

T = TypeVar("T")


def exchange_records(group: Group, record: bytes, name: str) -> list[bytes]:
    """Every rank's ``record`` on every rank, in rank order; all of one length. ``name`` is for messages, and compared.
    Collective. Cost: one round trip; in the window one wait, for up to 64 KB."""
    if group.size == 1:
        return [record]
    signature = Signature("exchange", (len(record),), name=name)
    records: list[bytes] = []
    if group.window is not None and len(record) <= loops.INLINE_BYTES:
        # The records travel beside those of the agreement check, whose wait is the only one.
        window, data = group.window, np.frombuffer(record, np.uint8)

        def attach() -> Attachment:
            return Attachment(address=data.ctypes.data, size_bytes=data.size)

        group.submit(signature, _inlined(window, len(record), records), attached=attach, awaited=True).wait()
        return records

    def body() -> Pending:
        exchange = group.transport.exchange(record)
        while not exchange.test():
            yield exchange
        records.extend(exchange.records())

    group.submit(signature, body(), awaited=True).wait()
    return records


def _inlined(window: Window, size_bytes: int, records: list[bytes]) -> Pending:
    """Read what every rank has published with its record, before this rank publishes anything else."""
    records.extend(window.sync.inlined(size_bytes))
    yield from ()


def gather_int(group: Group, value: int, name: str) -> list[int]:
    """Every rank's ``value`` (64 bits, signed) on every rank, in rank order. Collective. Cost: one round trip."""
    return [struct.unpack("<q", record)[0] for record in exchange_records(group, struct.pack("<q", value), name)]


def gather_bytes(group: Group, data: bytes, name: str) -> list[bytes]:
    """Every rank's ``data`` (any length, any content) on every rank, in rank order. Collective. For reports and
    set-up: all ranks get everything."""
    sizes = gather_int(group, len(data), f"length of {name}")
    records = exchange_records(group, data.ljust(max(1, *sizes, 1), b"\0"), name)
    return [record[:size] for record, size in zip(records, sizes, strict=True)]


def raise_together(group: Group, build: Callable[[], T]) -> T:
    """``build()`` on every rank; where ``build()`` raises UsageError on any rank, all ranks raise AgreedError, with the
    numbers of those ranks. Collective."""
    result: T | None = None
    message = b""
    try:
        result = build()
    except UsageError as error:
        message = str(error).encode(errors="backslashreplace")
    messages = gather_bytes(group, message, "set-up errors")
    if any(messages):
        texts = sorted({text.decode() for text in messages if text})
        ranks = [rank for rank, text in enumerate(messages) if text]
        where = "" if len(ranks) == group.size else f" (on ranks {', '.join(map(str, ranks))} of {group.size})"
        raise AgreedError("; ".join(texts) + where)
    return result  # type: ignore[return-value]


def ranks_of(ranks: Sequence[int]) -> str:
    """``[0, 2]`` as ``ranks 0, 2``."""
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def sides_of(texts: Sequence[str]) -> str:
    """``texts``, one for each rank, as the sides of a disagreement, each with its ranks."""
    sides: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        sides.setdefault(text, []).append(rank)
    return ", ".join(f"{ranks_of(ranks)}: {text}" for text, ranks in sides.items())
