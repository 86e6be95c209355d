"""An ordered set of ranks that call the same operations in the same order."""

from __future__ import annotations

import logging
import math
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ..errors import RefusedError, UsageError
from ..job.topology import Topology, usable_cores
from ..job.watch import Watch
from ..schedules.step import NodeStep
from ..transport.base import AtOnce, Counts, Offload, Pending, Piggyback, Request, Transport
from ..window.exchange import NOTHING, Attachment
from ..window.memory import Window
from .agreement import Agreement, Signature, refusal_of
from .at_once import Standing, at_once, watch_calls
from .direct import Direct
from .ending import ended_by
from .execute import Execution
from .handle import Handle, Operation
from .leaders import Leaders
from .progress import Progress
from .recording import recorder, refusal, unrecorded

log = logging.getLogger("commlab")


def _counted(name: str, doc: str) -> Any:
    """A count of where the group stands."""

    def put(group: Group, count: int) -> None:
        setattr(group.standing, name, count)

    return property(lambda group: getattr(group.standing, name), put, doc=doc)


class Group:
    """Ranks ``0 .. size - 1`` over one transport.

    ``check``: whether ranks compare what they are about to do before each operation (on by default; its cost is a
    column of the benchmark); with a window they always do, because the same exchange tells where the data lie.
    ``timeout_s``: how long a peer may be silent before an operation fails. ``threaded``: whether a thread of the
    group's own may move it on, where a core is free.
    """

    bytes_sent: int = _counted("bytes_sent", "Bytes that this rank has sent.")
    messages_sent: int = _counted("messages_sent", "Messages that this rank has sent.")
    node_bytes_read: int = _counted("node_bytes_read", "Bytes that this rank has read in the window.")
    node_bytes_written: int = _counted("node_bytes_written", "Bytes that this rank has written in the window.")

    def __init__(
        self,
        transport: Transport,
        topology: Topology,
        timeout_s: float = 300.0,
        check: bool = True,
        cores: int | None = None,
        threaded: bool = True,
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
        self.threaded = threaded
        threaded = threaded and free_core and transport.threads and not moves_itself
        self.progress = Progress(self.rank, timeout_s, threaded=threaded)
        self.progress_mode = (
            "the links' native thread"
            if moves_itself
            else "a thread of its own"
            if self.progress.threaded
            else "inline (the transport allows one thread only)"
            if free_core and not transport.threads
            else "inline (its owner's thread moves it on)"
            if free_core
            else "inline (no core is free)"
        )
        self.standing = Standing()
        self.progress.attach(self.standing)
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
        self.leaders: Leaders | None = None
        """The short way for few numbers where several ranks share a node; None where there is none."""
        self.plans: dict[tuple[Any, ...], Any] = {}
        """What operations have worked out once for each shape of call."""
        self.known_calls: dict[bytes, tuple[Any, ...]] = {}
        """Allreduces that native code does from the caller on, by what tells one from another."""
        self.endings: list[tuple[Callable[[], None], Callable[[], None]]] = []
        """Of those who use this group: what ends their work with other ranks, and, once all have done that, what
        releases it."""
        self._direct: Direct | None = None
        self._subgroups: weakref.WeakSet[Group] = weakref.WeakSet()
        self.watch: Watch | None = None
        """Who has left the job; None where nobody watches."""
        self.members: tuple[int, ...] = tuple(range(self.size))
        """The ranks of this group, as the job counts them."""
        self._closed = False
        self._calls = threading.RLock()
        """Held while an operation gets its place in the order."""
        self._awaited: tuple[Handle, int] | None = None
        """The last operation whose caller went on to wait for it, and the caller's thread."""

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
        even while this group still waits for something else."""
        ended = self.progress.ended
        if ended is not None:
            raise ended.error(signature.kind, self.rank)
        if (by := self.recorder()) and not signature.refusal:
            return self.refuse(signature.kind, signature.name, refusal(self.rank, signature.kind, by))
        with self._calls:
            standing = self.standing
            in_call: Signature | None = standing.in_call
            if in_call is not None and not signature.refusal:
                text = in_call.text(standing.sequence)
                return self.refuse(signature.kind, signature.name, _two_threads(self.rank, text))
            awaited_now = self._awaited
            if awaited_now is not None:
                handle, thread = awaited_now
                if handle.finished or thread == threading.get_ident():
                    self._awaited = None
                elif not signature.refusal:
                    return self.refuse(signature.kind, signature.name, _two_threads(self.rank, handle.describe()))
            standing.sequence += 1
            handle = self._queue(signature, body, result, attached or (lambda: NOTHING), awaited, launches)
            if awaited and not handle.finished:
                self._awaited = handle, threading.get_ident()
                handle.when_finished(self._no_longer_awaited)
            return handle

    def _no_longer_awaited(self, handle: Handle) -> None:
        # Not kept until the next operation: its result may be large.
        if self._awaited is not None and self._awaited[0] is handle:
            self._awaited = None

    def refuse(self, kind: str, name: str | None, error: Exception) -> Handle:
        """Tell the other ranks, in the place of an operation that they have started or will start, that this rank can't
        do it because of ``error``: so nobody waits for this rank. Collective with :meth:`submit`; the handle's
        ``wait()`` raises RefusedError on all ranks. ``error`` itself is raised at once where nobody listens: in a group
        of one rank, or without the agreement check."""
        if self.progress.ended is not None:
            raise self.progress.ended.error(kind, self.rank)
        if self.size == 1 or not (self.agreement.checks or kind == "subgroup"):
            raise error
        name = name if isinstance(name, str) else None
        signature = Signature(kind, name=name, refusal=refusal_of(error, self.rank))
        if not recorder():
            return self.submit(signature, attached=partial(_raise, error))
        with unrecorded():
            handle = self.submit(signature, attached=partial(_raise, error))
            with suppress(RefusedError):  # raised by who waits
                handle.wait()
        return handle

    def recorder(self) -> str:
        """What records this rank's calls, which can't be recorded (:mod:`.recording`); empty in a group of one rank, in
        which they do nothing."""
        return recorder() if self.size > 1 else ""

    def _queue(
        self,
        signature: Signature,
        body: Iterable[Request],
        result: Any,
        attached: Callable[[], Attachment | Piggyback | Offload],
        awaited: bool,
        launches: bool = False,
    ) -> Handle:
        sequence = self.standing.sequence
        checked = self.agreement.before(signature, sequence, body, attached)
        handle = Handle(self.progress, partial(signature.text, sequence), result)
        operation = Operation(checked, handle, self.rank, self.departed)
        if launches and self.progress.all_begun():
            # What is launched shares no channel with what Python still moves on, and may begin before that has ended.
            # Launches and announcements keep the order in which they were called.
            operation.advance()
        return self.progress.submit(operation, awaited)

    def at_once(self, signature: Signature, call: AtOnce, kept: Any, address: int, second: int | None = None) -> bool:
        """The shortest way for an operation on the numbers at ``address``: agreement, wait and result in one native
        call, where nothing else is under way. Collective with :meth:`submit`: ranks may differ in which of the two they
        take. ``kept``: what has the memory. Whether it was possible; if not, nothing was done."""
        assert at_once is not None
        return at_once(self, signature, call, kept, address, second)

    def _rest(self, call: AtOnce, signature: Signature, sequence: int, kept: Any, left: Any) -> Handle:
        """What :meth:`at_once` has not done, as an operation."""
        return self._go_on(signature, sequence, call.resume(self, signature, sequence, kept, left))

    def _broke_off(self, signature: Signature, sequence: int, error: BaseException) -> None:
        """The native call of :meth:`at_once` has raised ``error``."""
        self.progress.end(ended_by(error, signature.text(sequence)))

    def forget_plans(self) -> None:
        """Work out anew what calls have in common, where what it follows from is no longer so."""
        self.plans.clear()
        self.known_calls.clear()

    def count(self, counts: Counts) -> None:
        """Count what an operation in one native call did for this rank."""
        self.bytes_sent += counts.bytes_sent
        self.messages_sent += counts.messages_sent
        self.node_bytes_read += counts.node_bytes_read
        self.node_bytes_written += counts.node_bytes_written

    def _go_on(self, signature: Signature, sequence: int, rest: Pending) -> Handle:
        """Queue the ``rest`` of an operation that was begun in the native call, before all that was called since. The
        caller waits for it."""
        handle = Handle(self.progress, partial(signature.text, sequence), None)
        self._awaited = handle, threading.get_ident()
        handle.when_finished(self._no_longer_awaited)
        self.progress.put_first(Operation(rest, handle, self.rank, self.departed))
        return handle

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

    @property
    def byte_s(self) -> float:
        """What a byte takes between two nodes; infinity where nobody has measured it. Equal on all ranks."""
        measured: float = self.transport.byte_s if self.transport.moves_itself else math.inf  # type: ignore[attr-defined]
        return measured

    def observe(self, watch: Watch | None, members: Sequence[int]) -> None:
        """From now on whoever waits in this group hears of its ranks that have left. ``members``: the group's ranks, as
        the job counts them."""
        self.watch, self.members = watch, tuple(members)

    def departed(self, rank: int) -> str:
        """How ``rank`` has left the job (``left (exit code 3)``); empty while it is there, as far as is known. Not
        collective; costs no message."""
        return "" if self.watch is None else self.watch.departed(self.members[rank])

    @property
    def direct(self) -> Direct:
        """Messages between two ranks, which the others need not know of. UsageError where the group's transport has
        none."""
        if self._direct is None:
            if self._closed:
                raise UsageError(f"rank {self.rank}: a message on a group that was shut down")
            self._direct = Direct(self.transport.beside(), self.timeout_s, self.departed, self.progress)
        return self._direct

    def barrier(self) -> None:
        """Return once every rank has called it. Cost: one round trip."""
        window = self.window
        if window is None or not self.at_once(_BARRIER, AtOnce(window.meet, (), _resume_barrier, _MET), None, 0):
            self.submit(_BARRIER, awaited=True).wait()
        if window is not None:
            window.let_go()

    def subgroup(self, ranks: Sequence[int]) -> Group | None:
        """A group of ``ranks`` of this one, in that order. Collective over this group; None on ranks that are not in
        it. It takes nothing of the transport but numbers; it ends when nobody has it any more."""
        try:
            ranks = [operator.index(rank) for rank in ranks]
            if len(set(ranks)) != len(ranks) or not all(0 <= rank < self.size for rank in ranks) or not ranks:
                raise UsageError(f"rank {self.rank}: {ranks} is not a set of ranks of a group of {self.size}")
        except Exception as error:
            self.refuse("subgroup", None, error).wait()
            raise
        transport = self.split(ranks)
        if transport is None:
            return None
        topology = self.topology.subgroup(ranks)
        made = Group(transport, topology, self.timeout_s, self.agreement.required, self.cores, self.threaded)
        made.observe(self.watch, [self.members[rank] for rank in ranks])
        self._subgroups.add(made)
        return made

    def split(self, ranks: Sequence[int], *, any_order: bool = False) -> Transport | None:
        """A transport among ``ranks`` of this group, in that order (:meth:`Transport.split`). Collective over this
        group; None on ranks that are not among them."""
        contexts = [self.transport.contexts.offered]

        def body() -> Pending:
            if self.size > 1:
                exchange = self.transport.exchange(contexts[0].to_bytes(8, "little"))
                while not exchange.test():
                    yield exchange
                contexts.extend(int.from_bytes(record, "little") for record in exchange.records())

        signature = Signature("subgroup", detail=f"ranks {', '.join(map(str, ranks))}")
        self.submit(signature, body(), awaited=True).wait()
        return self.transport.split(ranks, max(contexts), any_order=any_order)

    def leave(self) -> None:
        """End what others may be waiting for. Not collective."""
        for end, _ in list(self.endings):
            end()

    def close(self) -> None:
        """Release the transport and the window; tensors that lie there stay as they are. Collective; later operations
        are refused, those of its sub-groups too."""
        if not self._closed:
            self.leave()
            for made in list(self._subgroups):
                made.close()
            self._closed = True
            orderly = self.progress.ended is None
            for _, free in list(self.endings):
                free()
            for level in (self.node, self.across, self.leaders):
                if level is not None:
                    level.close()
            self.progress.close()
            if self._direct is not None:
                self._direct.close(orderly)
            self.forget_plans()  # some hold the window
            if self.window is not None:
                self.window.close()
                self.window = self.agreement.window = None
                self.window_reason = "the group was shut down"
            self.transport.close(orderly)


_BARRIER = Signature("barrier")
_MET = {True: Counts()}


def _resume_barrier(group: Group, signature: Signature, sequence: int, kept: None, left: object) -> Pending:
    # The record is published.
    return group.agreement.before(signature, sequence, (), lambda: None)


def _raise(error: Exception) -> Attachment:
    raise error


def _two_threads(rank: int, what: str) -> UsageError:
    return UsageError(
        f"rank {rank}: another thread of this rank waits in {what} of the same group. Ranks could take "
        "the calls of two threads in different orders; give each thread a group of its own, or call one after the other"
    )


watch_calls(Group)
