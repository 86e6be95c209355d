"""An ordered set of ranks that call the same operations in the same order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from .. import trace
from ..errors import UsageError
from ..job.topology import Topology, usable_cores
from ..native import library
from ..schedules.step import NodeStep
from ..transport.base import Offload, Pending, Piggyback, Request, Transport
from ..window.exchange import NOTHING, Attachment, Inline
from ..window.memory import Window
from .agreement import Agreement, Signature
from .execute import Execution
from .handle import Handle
from .progress import Operation, Progress

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
        self.transport, self.topology, self.timeout_s = transport, topology, timeout_s
        self.rank, self.size = transport.rank, transport.size
        self.nodes = topology.nodes
        self.local_rank = topology.local_rank(self.rank)
        self.local_size = len(topology.node_of(self.rank))
        self.cores = usable_cores() if cores is None else cores
        """Cores that the ranks of this node share."""
        free_core = self.cores > self.local_size and usable_cores() > 1 and self.size > 1
        self.crowded = self.cores < self.local_size
        """Whether the ranks of this node share cores."""
        moves_itself = transport.moves_itself
        self.progress = Progress(self.rank, timeout_s, threaded=free_core and transport.threads and not moves_itself)
        self.progress_mode = (
            "the links' native thread"
            if moves_itself
            else "a thread of its own"
            if self.progress.threaded
            else "inline (the transport allows one thread only)"
            if free_core
            else "inline (no core is free)"
        )
        self.bytes_sent = self.messages_sent = 0
        self.node_bytes_read = self.node_bytes_written = 0
        """What this rank's loops over the window read and wrote."""
        self.agreement = Agreement(transport, check)
        self.window: Window | None = None
        """Memory shared with all other ranks of this group; None until :meth:`share`, or where it can't be had."""
        self.window_reason = "not asked for"
        """Why there is no window."""
        self.links_reason = ""
        """Why the ranks of several nodes use this transport; empty where nobody chose."""
        self.node: Group | None = None
        """The ranks of this rank's node, which share a window; None where the group has one node, or no windows."""
        self.across: Group | None = None
        """The ranks that have this rank's local rank, one on each node; None where :attr:`node` is."""
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
        attached: Callable[[], Attachment | Piggyback | Offload] | None = None,
        awaited: bool = False,
        launches: bool = False,
    ) -> Handle:
        """Queue ``body`` to run once all ranks are known to agree on ``signature``. Collective. ``attached()`` is asked
        for just before this rank tells the others: what it publishes in the window, or what travels with its record.
        ``awaited``: the caller waits for it at once. ``launches``: the transport is to move it by itself from now on,
        whatever this group still waits for."""
        if self._closed:
            raise UsageError(f"rank {self.rank}: {signature.kind} on a group that was shut down")
        self._sequence += 1
        return self._queue(signature, body, result, attached or (lambda: NOTHING), awaited, launches)

    def _queue(
        self,
        signature: Signature,
        body: Iterable[Request],
        result: Any,
        attached: Callable[[], Attachment | Piggyback | Offload | None],
        awaited: bool,
        launches: bool = False,
    ) -> Handle:
        checked = self.agreement.before(signature, self._sequence, body, attached)
        handle = Handle(self.progress, partial(signature.text, self._sequence), result)
        operation = Operation(checked, handle, self.rank)
        if launches:
            # Launches keep their order among themselves, and share no channel with what else the group does: so this
            # one may begin before those that Python has still to move on.
            operation.advance()
        return self.progress.submit(operation, awaited)

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

    def execute(self, execution: Execution) -> Pending:
        """Run an execution and count what it sent."""
        yield from execution.run()
        self.bytes_sent += execution.bytes_sent
        self.messages_sent += execution.messages_sent

    def account(self, step: NodeStep) -> None:
        """Count what a native loop over the window did for this rank."""
        self.node_bytes_read += step.bytes_read
        self.node_bytes_written += step.bytes_written

    def share(self, window: Window) -> None:
        """From now on the group's operations go through ``window``, which all its ranks have opened."""
        self.window = self.agreement.window = window

    def barrier(self) -> None:
        """Return once every rank has called it. Cost: one round trip."""
        self.submit(Signature("barrier"), awaited=True).wait()

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
            else Group(transport, self.topology.subgroup(ranks), self.timeout_s, self.agreement.required, self.cores)
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
            for level in (self.node, self.across):
                if level is not None:
                    level.close()
            self.progress.close()
            if self.window is not None:
                self.window.close()
                self.window = self.agreement.window = None
                self.window_reason = "the group was shut down"
            self.transport.close()
