"""What all ranks of a group come to know: small records of each, and errors that any of them has had."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TypeVar

from ..errors import AgreedError, UsageError
from ..transport.base import Pending
from .agreement import Signature
from .group import Group

T = TypeVar("T")


def exchange_records(group: Group, record: bytes, name: str) -> list[bytes]:
    """Every rank's ``record`` on every rank, in rank order; all of one length. ``name`` is for messages, and compared.
    Collective. Cost: one round trip."""
    if group.size == 1:
        return [record]
    records: list[bytes] = []

    def body() -> Pending:
        exchange = group.transport.exchange(record)
        while not exchange.test():
            yield exchange
        records.extend(exchange.records())

    group.submit(Signature("exchange", (len(record),), name=name), body(), awaited=True).wait()
    return records


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
