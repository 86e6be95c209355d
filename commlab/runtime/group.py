"""An ordered set of ranks that call the same operations in the same order."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .. import trace
from ..errors import DisagreementError, UsageError
from ..job.topology import Topology, usable_cores
from ..native import library
from ..schedules.step import NodeStep
from ..transport.base import Carried, Exchange, Pending, Request, Transport
from ..window.exchange import NOTHING, Attachment, Inline, WindowExchange, WindowWait, open_together
from ..window.memory import Window
from .agreement import Signature, disagreement
from .execute import Execution
from .handle import Handle
from .progress import Progress
from .waiting import SPIN_S

log = logging.getLogger("commlab")


_INLINE_WAIT_US = 1e5
"""Back after this long: for signals, and to see who is silent."""
_INLINE_DONE = getattr(library.built, "INLINE_DONE", 0)


class Group:
    """Ranks ``0 .. size - 1`` over one transport.

    ``check``: whether ranks compare what they are about to do before each operation (on by default; its cost is a
    column of the benchmark); with a window they always do, because the same exchange tells where the data lie.
    ``timeout_s``: how long a peer may be silent before an operation fails.
    """

    def __init__(
        self,
        transport: Transport,
        topology: Topology,
        timeout_s: float = 300.0,
        check: bool = True,
        cores: int | None = None,
    ):
        assert topology.size == transport.size
        self.transport, self.topology, self.timeout_s, self.check = transport, topology, timeout_s, check
        self.rank, self.size = transport.rank, transport.size
        self.nodes = topology.nodes
        self.local_rank = topology.local_rank(self.rank)
        self.local_size = len(topology.node_of(self.rank))
        self.cores = usable_cores() if cores is None else cores
        """Cores that the ranks of this node share."""
        free_core = self.cores > self.local_size and usable_cores() > 1 and self.size > 1
        self.crowded = self.cores < self.local_size
        """Whether the ranks of this node share cores."""
        self.progress = Progress(self.rank, timeout_s, threaded=free_core and transport.threads)
        self.progress_mode = (
            "a thread of its own"
            if self.progress.threaded
            else "inline (the transport allows one thread only)"
            if free_core
            else "inline (no core is free)"
        )
        self.bytes_sent = self.messages_sent = 0
        self.node_bytes_read = self.node_bytes_written = 0
        """What this rank's loops over the window read and wrote."""
        self.window: Window | None = None
        """Memory shared with all other ranks of this group; None until :meth:`open_window`, or where it can't be
        had."""
        self.node: Group | None = None
        """The ranks of this rank's node, and"""
        self.across: Group | None = None
        """the ranks with this rank's local rank on all nodes; for algorithm hierarchical."""
        self.window_reason = "not asked for"
        """Why there is no window."""
        self.plans: dict[tuple[Any, ...], Any] = {}
        """What operations have worked out once for each shape of call."""
        self.endings: list[tuple[Callable[[], None], Callable[[], None]]] = []
        """Of those who use this group: what ends their work with other ranks, and, once all have done that, what
        releases it."""
        self._sequence = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<Group rank {self.rank} of {self.size}, {len(self.nodes)} node(s), transport {self.transport.name}>"

    def submit(
        self,
        signature: Signature,
        body: Iterable[Request] = (),
        result: Any = None,
        attached: Callable[[], Attachment | Carried] | None = None,
        awaited: bool = False,
    ) -> Handle:
        """Queue ``body`` to run once all ranks are known to agree on ``signature``. Collective. ``attached()`` is asked
        for just before this rank tells the others: what it publishes in the window, or what travels with its record.
        ``awaited``: the caller waits for it at once."""
        if self._closed:
            raise UsageError(f"rank {self.rank}: {signature.kind} on a group that was shut down")
        self._sequence += 1
        return self._queue(signature, body, result, attached or (lambda: NOTHING), awaited)

    def _queue(
        self,
        signature: Signature,
        body: Iterable[Request],
        result: Any,
        attached: Callable[[], Attachment | Carried | None],
        awaited: bool,
    ) -> Handle:
        checked = self._checked(signature, self._sequence, body, attached)
        return self.progress.submit(Handle(checked, result, signature, self._sequence, self.progress), awaited)

    def allreduce_inline(
        self, signature: Signature, data: Inline, result: torch.Tensor, otherwise: Callable[[], Pending]
    ) -> bool:
        """The shortest way through the window for an allreduce of a few numbers: agreement, wait and reduction in one
        native call, where nothing else is under way. Collective with :meth:`submit`: ranks may differ in which of the
        two they take. False: not possible now, nothing was done. ``otherwise()`` makes the body that goes on when a
        peer lets this rank wait, or disagrees."""
        assert self.window is not None
        if self._closed or trace.enabled() or not self.progress.take():
            return False
        try:
            self._sequence += 1
            number = signature.number(self._sequence)
            ended = self.window.sync.allreduce_inline(number, result.data_ptr(), *data, _INLINE_WAIT_US)
        finally:
            self.progress.leave()
        if ended == _INLINE_DONE:
            size_bytes = result.numel() * result.element_size()
            self.node_bytes_read += size_bytes * self.size
            self.node_bytes_written += size_bytes
        else:
            self._queue(signature, otherwise(), result, lambda: None, awaited=True).wait()
        return True

    def _checked(
        self,
        signature: Signature,
        sequence: int,
        body: Iterable[Request],
        attached: Callable[[], Attachment | Carried | None],
    ) -> Pending:
        if self.size > 1 and (self.check or self.window is not None or signature.kind in ("barrier", "subgroup")):
            record = signature.record(sequence)
            exchange = self._announce(record, attached)
            while not exchange.test():
                yield exchange
            if not exchange.agreed(record):
                texts = self.transport.exchange(signature.padded_text(sequence))
                while not texts.test():
                    yield texts
                raise DisagreementError(disagreement(texts.records(), self.rank))
        yield from body

    def _announce(
        self, record: bytes, attached: Callable[[], Attachment | Carried | None]
    ) -> Exchange | WindowExchange:
        brought = attached()
        if self.window is None or isinstance(brought, Carried):
            return self.transport.exchange(record, brought if isinstance(brought, Carried) else None)
        wait = WindowWait(self.window, self.rank_on_node)
        return WindowExchange(self.window, wait, int.from_bytes(record, "little"), brought)

    def execute(self, execution: Execution) -> Pending:
        """Run an execution and count what it sent."""
        yield from execution.run()
        self.bytes_sent += execution.bytes_sent
        self.messages_sent += execution.messages_sent

    def account(self, step: NodeStep) -> None:
        """Count what a native loop over the window did for this rank."""
        self.node_bytes_read += step.bytes_read
        self.node_bytes_written += step.bytes_written

    def rank_on_node(self, local_rank: int) -> int:
        """The rank in this group of a local rank of this node; for messages."""
        return self.topology.node_of(self.rank)[local_rank]

    def open_window(self) -> None:
        """Share memory among all ranks of the group, which must be on one node. Collective. Where it can't be had on
        any rank, none has it, and ``window_reason`` says why."""
        if self.size == 1 or len(self.nodes) > 1:
            self.window_reason = "one rank" if self.size == 1 else f"the ranks are on {len(self.nodes)} nodes"
            return
        spin_us = 0.0 if self.crowded else SPIN_S * 1e6
        self.window, self.window_reason = open_together(self.local_rank, self.size, spin_us, self.gather_bytes)
        if self.window is None and self.rank == 0:
            log.warning("no window for the ranks of this node, which send messages instead: %s", self.window_reason)

    def barrier(self) -> None:
        """Return once every rank has called it. Cost: one round trip."""
        self.submit(Signature("barrier"), awaited=True).wait()

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

        self.submit(Signature("exchange", (len(record),), name=name), body(), awaited=True).wait()
        return records

    def gather_int(self, value: int, name: str) -> list[int]:
        """Every rank's ``value`` (64 bits, signed) on every rank, in rank order. Collective. Cost: one round trip."""
        return [struct.unpack("<q", record)[0] for record in self.exchange_records(struct.pack("<q", value), name)]

    def gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        """Every rank's ``data`` (any length, any content) on every rank, in rank order. Collective. For reports and
        set-up: all ranks get everything."""
        sizes = self.gather_int(len(data), f"length of {name}")
        records = self.exchange_records(data.ljust(max(1, *sizes, 1), b"\0"), name)
        return [record[:size] for record, size in zip(records, sizes, strict=True)]

    def subgroup(self, ranks: Sequence[int]) -> Group | None:
        """A group of ``ranks`` of this one, in that order. Collective over this group; None on ranks that are not in
        it."""
        if len(set(ranks)) != len(ranks) or not all(0 <= rank < self.size for rank in ranks) or not ranks:
            raise UsageError(f"rank {self.rank}: {list(ranks)} is not a set of ranks of a group of {self.size}")
        self.submit(Signature("subgroup", detail=f"ranks {', '.join(map(str, ranks))}")).wait()
        transport = self.transport.split(ranks)
        return (
            None
            if transport is None
            else Group(transport, self.topology.subgroup(ranks), self.timeout_s, self.check, self.cores)
        )

    def leave(self) -> None:
        """End what others may be waiting for. Not collective."""
        for end, _ in self.endings:
            end()

    def close(self) -> None:
        """Release the transport and the window; tensors that lie there stay as they are. Collective; later operations
        are refused."""
        if not self._closed:
            self.leave()
            self._closed = True
            for _, free in self.endings:
                free()
            for part in (self.node, self.across):
                if part is not None:
                    part.close()
            self.progress.close()
            if self.window is not None:
                self.window.close()
                self.window, self.window_reason = None, "the group was shut down"
            self.transport.close()
