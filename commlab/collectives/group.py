"""An ordered set of ranks that call the same operations in the same order."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import DisagreementError, UsageError
from ..topology import Topology, usable_cores
from ..transport.base import Request, Transport
from .execute import Execution, Pending
from .handle import Handle
from .progress import Progress
from .signature import Signature, disagreement


class Group:
    """Ranks ``0 .. size - 1`` over one transport.

    ``check``: whether ranks compare what they are about to do before each operation (on by default; its cost is a column of the
    benchmark). ``timeout_s``: how long a peer may be silent before an operation fails.
    """

    def __init__(self, transport: Transport, topology: Topology, timeout_s: float = 300.0, check: bool = True):
        assert topology.size == transport.size
        self.transport, self.topology, self.timeout_s, self.check = transport, topology, timeout_s, check
        self.rank, self.size = transport.rank, transport.size
        self.nodes = topology.nodes
        self.local_rank = topology.local_rank(self.rank)
        self.local_size = len(topology.node_of(self.rank))
        free_core = usable_cores() > self.local_size and self.size > 1
        self.progress = Progress(self.rank, self.local_size, timeout_s, threaded=free_core and transport.threads)
        self.progress_mode = (
            "a thread of its own"
            if self.progress.threaded
            else "inline (the transport allows one thread only)"
            if free_core
            else "inline (no core is free)"
        )
        self.bytes_sent = self.messages_sent = 0
        self._sequence = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<Group rank {self.rank} of {self.size}, {len(self.nodes)} node(s), transport {self.transport.name}>"

    def submit(self, signature: Signature, body: Iterable[Request] = (), result: Any = None) -> Handle:
        """Queue ``body`` to run once all ranks are known to agree on ``signature``. Collective."""
        if self._closed:
            raise UsageError(f"rank {self.rank}: {signature.kind} on a group that was shut down")
        self._sequence += 1
        describe = signature.text(self._sequence)
        return self.progress.submit(Handle(self._checked(signature, self._sequence, body), result, describe, self.progress))

    def _checked(self, signature: Signature, sequence: int, body: Iterable[Request]) -> Pending:
        if self.size > 1 and (self.check or signature.kind in ("barrier", "subgroup")):
            record = signature.record(sequence)
            exchange = self.transport.exchange(record)
            while not exchange.test():
                yield exchange
            if not exchange.agreed(record):
                texts = self.transport.exchange(signature.padded_text(sequence))
                while not texts.test():
                    yield texts
                raise DisagreementError(disagreement(texts.records(), self.rank))
        yield from body

    def execute(self, execution: Execution) -> Pending:
        """Run an execution and count what it sent."""
        yield from execution.run()
        self.bytes_sent += execution.bytes_sent
        self.messages_sent += execution.messages_sent

    def barrier(self) -> None:
        """Return once every rank has called it. Cost: one round trip."""
        self.submit(Signature("barrier")).wait()

    def exchange_records(self, record: bytes, name: str) -> list[bytes]:
        """Every rank's ``record`` on every rank, in rank order; all of one length. Collective. Cost: one round trip."""
        if self.size == 1:
            return [record]
        records: list[bytes] = []

        def body() -> Pending:
            exchange = self.transport.exchange(record)
            while not exchange.test():
                yield exchange
            records.extend(exchange.records())

        self.submit(Signature("exchange", (len(record),), name=name), body()).wait()
        return records

    def gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        """Every rank's ``data`` (any length, any content) on every rank, in rank order. Collective. For reports and set-up: all
        ranks get everything."""
        lengths = self.exchange_records(struct.pack("<q", len(data)), f"length of {name}")
        sizes = [struct.unpack("<q", length)[0] for length in lengths]
        records = self.exchange_records(data.ljust(max(1, *sizes, 1), b"\0"), name)
        return [record[:size] for record, size in zip(records, sizes, strict=True)]

    def subgroup(self, ranks: Sequence[int]) -> Group | None:
        """A group of ``ranks`` of this one, in that order. Collective over this group; None on ranks that are not in it."""
        if len(set(ranks)) != len(ranks) or not all(0 <= rank < self.size for rank in ranks) or not ranks:
            raise UsageError(f"rank {self.rank}: {list(ranks)} is not a set of ranks of a group of {self.size}")
        self.submit(Signature("subgroup", detail=f"ranks {', '.join(map(str, ranks))}")).wait()
        transport = self.transport.split(ranks)
        return None if transport is None else Group(transport, self.topology.subgroup(ranks), self.timeout_s, self.check)

    def close(self) -> None:
        """Release the transport. Collective; later operations are refused."""
        if not self._closed:
            self._closed = True
            self.progress.close()
            self.transport.close()
