"""The parameter server as one object: ``ParameterServer`` on every rank; some ranks serve, the others are its users.

servers    own the values and run the optimizer; the first values are those of worker 0's ``named_params``
workers    push gradients, pull values, and end their clocks with ``step()``; ``store.group`` is their own group
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ..errors import UsageError
from ..native.dtypes import WIRES
from ..runtime.control import raise_together
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..runtime.recording import recorder, refusal
from ..runtime.world import resolve
from ..transport.sim import SimNetwork
from . import hypers
from .ending import StoreEnding
from .messages import Header, Kind
from .placement import Placement, Slice
from .plan import make_plan, make_shard, on_the_cpu, side_by_side
from .server.ledger import Record
from .server.loop import ServerLoop
from .server.server import Server
from .server.shard import Factory
from .worker.calls import PendingRequests
from .worker.client import Client
from .worker.requests import Requests

_NO_CLOCK = 2**62
"""The clock of a worker that has left: it waits for none of its own."""


class ClockVerdict(NamedTuple):
    """What servers have agreed on at a clock's end: the norm of the gradient before clipping, and whether all of the
    gradient was finite."""

    norm: float
    finite: bool


class ParameterServer:
    """Build it on all ranks of ``group`` (default: all), with the same arguments; collective.

    On server ranks the constructor serves, and returns when all workers have closed the store: ``role`` is "server"
    then. On workers ``role`` is "worker" and it returns at once.

    ``named_params``: (name, tensor) in the order in which forward needs them, for example
    ``model.named_parameters()``. A tensor under two names is one. Names are the keys; dtypes float32, float64, float16,
    bfloat16. ``optimizer``: a factory that is given a list of tensors (flat pieces, on the servers) and returns the
    torch optimizer that updates them; None: what is pushed is added to the value. ``groups``: key to its group in the
    optimizer, where there are several: the factory is given ``[{"params": [...]}, ...]`` then. ``consistency``:
    ``"bsp"``, ``"ssp:S"``, ``"asp"`` (:mod:`commlab.ps.consistency`); under bsp the workers' pushes of one clock are
    averaged, a worker's that pushed nothing counting as zero. ``servers``: how many ranks serve; None: one, and in a
    group of one rank a server in this process. ``wire``: None, ``"fp16"``, ``"bf16"``: how numbers travel, both ways;
    they are added in fp32 and rounded once. ``max_grad_norm``: clip each clock's gradient to this global norm, over all
    servers (bsp only). ``skips``: make no update in a clock in which any number pushed was not finite (bsp only).
    Errors: UsageError on every rank for what can't be; DisagreementError where ranks were given different arguments.
    Cost: servers hold the values, the optimizer's state, and under bsp a copy of their shard for every worker.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, torch.Tensor]],
        optimizer: Factory | None = None,
        consistency: str = "bsp",
        servers: int | None = None,
        *,
        group: Group | None = None,
        wire: str | None = None,
        max_grad_norm: float | None = None,
        skips: bool = False,
        groups: Mapping[str, int] | None = None,
        elementwise: bool | None = None,
        log: list[Record] | None = None,
    ):
        everyone = resolve(group)
        plan = raise_together(
            everyone,
            lambda: make_plan(
                everyone,
                named_params,
                optimizer,
                groups or {},
                elementwise,
                consistency,
                servers,
                wire,
                max_grad_norm,
                skips,
            ),
        )
        rules, ranks, workers, alone = plan.rules, plan.ranks, plan.workers, plan.alone
        self.consistency = rules.consistency
        self.servers = ranks
        """Ranks of the group that serve."""
        self._keys = plan.keys
        self.placement: Placement = self._keys.placement
        self.optimizer = plan.optimizer
        """The factory's optimizer. The hyper-parameters of its groups go with the first push of every clock, so
        learning-rate schedulers work on it. On workers it updates nothing itself."""
        self._optimizer_groups = 0 if self.optimizer is None else len(self.optimizer.param_groups)
        self._keys.require_agreement(everyone, f"{consistency}, {len(ranks)} servers, wire {wire}, {rules[3:]}")
        self.role = "server" if everyone.rank in ranks else "worker"
        self.clock = 0
        """How many clocks this worker has ended."""
        self.grad_scale = 1.0
        """What this worker's gradients have been multiplied by, and what servers divide them by. The scale goes with
        the first push of a clock."""
        self.lr_factor = 1.0
        """What the learning rates of ``optimizer`` are multiplied by on their way to the servers."""
        self.server: Server | None = None
        """The server in this process: on server ranks, and in a group of one rank."""
        self.agrees = rules.agrees
        """Whether servers agree on a clock's norm before they update."""
        self._closed, self._left = self.role == "server", False
        self._pid = os.getpid()
        own_group = None if alone else everyone.subgroup(workers)
        self.group: Group = own_group or everyone
        """The workers; on a server rank, everyone."""
        near, far = _transports(everyone, alone)
        crowded, timeout_s = everyone.crowded, everyone.timeout_s
        serving: ServerLoop | None = None
        serves = alone or self.role == "server"
        index = 0 if alone else ranks.index(everyone.rank) if serves else -1
        # A factory may fail on the servers' tensors alone; the workers are told.
        shard = raise_together(everyone, lambda: make_shard(everyone, plan, index, optimizer) if serves else None)
        if shard is not None:
            names = [f"worker rank {rank}" for rank in workers]
            self.server = Server(shard, rules, index, names, log)
            # A worker that waits for a server is told for whom the server waits, before the worker's own time is over.
            serving = ServerLoop(self.server, far, workers, ranks, 0.9 * timeout_s, crowded, everyone.departed)
        self._ending = StoreEnding(self, everyone, near, own_group)
        if self.role == "server":
            assert serving is not None
            with on_the_cpu():
                serving.run()
            self._ending.complete()
            return
        self._client = Client(
            near, ranks, timeout_s, crowded, None if serving is None else serving.poll, everyone.departed
        )
        self._client.clock = 0
        self._requests = Requests(self._client, self._keys, WIRES[wire], self.consistency, rules.agrees)
        self._ending.watch(self, self._client, self._requests)
        if self.group.rank == 0:
            for together, flat in side_by_side(self._keys.tensors):
                self.assign_flat(together, flat).wait()
        if self.group.size > 1:
            self.group.barrier()

    # Push and pull.

    def push(self, key: str, tensor: torch.Tensor | None) -> Handle:
        """Give the servers an update of ``key``: a gradient, of the parameter's shape and dtype. Leave ``tensor`` alone
        until ``wait()``, which returns once the servers have taken it in. Under bsp a worker that has ended more clocks
        than others waits here for them. None: this worker has no gradient of ``key`` in this clock; what no worker has
        a gradient of is not updated. Small tensors wait for others, to travel with them, until the next ``wait()``,
        ``done()``, ``poll()`` or ``step()``; an error that no ``wait()`` has raised is raised by a later ``step()``."""
        self._require_worker("push")
        if tensor is None:
            return self._push_nothing(key)
        self._keys.require(key, tensor, "push")
        if tensor.requires_grad or tensor.dim() != 1:
            tensor = tensor.detach().reshape(-1)
        self._requests.send_hypers(self.clock, self._hyper_values, self._hypers)
        return self._requests.push((key,), tensor, self.clock)

    def pull(self, key: str, out: torch.Tensor) -> Handle:
        """Write the value of ``key`` into ``out`` (of its shape and dtype) as soon as the consistency allows a read at
        this worker's clock. ``wait()`` returns ``out``.

        After a push of ``key`` in the same clock the pull reads what the push has made of the value. Under bsp this is
        the value with all workers' pushes of the clock, as after :meth:`push_pull`, never the value before; with
        ``max_grad_norm`` or ``skips`` it is there once all workers have called ``step()``, so waiting for it before
        this worker's own ``step()`` is a UsageError."""
        self._require_worker("pull")
        self._keys.require_out(key, out, "pull")
        return self._requests.pull_into(key, out, self.clock)

    def push_pull(self, key: str, tensor: torch.Tensor | None, out: torch.Tensor) -> Handle:
        """Push, and read what the next clock will begin with: under bsp the value updated with all workers' pushes of
        this clock. ``wait()`` returns ``out``; where that takes this worker's own ``step()``, waiting before it is a
        UsageError."""
        self._require_worker("push_pull")
        if tensor is not None:
            self._keys.require(key, tensor, "push_pull")
        self._keys.require_out(key, out, "push_pull")
        return self._requests.pull_into(key, out, self.clock, follows=self.push(key, tensor))

    def _push_nothing(self, key: str) -> Handle:
        self._keys.entry(key)
        return self._requests.push_nothing((key,), self.clock)

    def push_flat(self, keys: Sequence[str], flat: torch.Tensor) -> Handle:
        """:meth:`push` of several tensors of one dtype that lie side by side in ``flat`` (1-D), possibly already in the
        wire's dtype; adjoining slices travel in one message."""
        self._require_worker("push_flat")
        self._keys.require_flat(keys, flat, "push_flat", self._requests.wire)
        self._requests.send_hypers(self.clock, self._hyper_values, self._hypers)
        return self._requests.push(tuple(keys), flat, self.clock)

    def pull_flat(self, keys: Sequence[str], flat: torch.Tensor, *, exact: bool = False) -> Handle:
        """:meth:`pull` of several tensors of one dtype into ``flat`` (1-D, contiguous, CPU). ``exact``: as they are on
        the servers, whatever the wire."""
        self._require_worker("pull_flat")
        self._keys.require_flat(keys, flat, "pull_flat", None)
        return self._requests.pull_flat(tuple(keys), flat, self.clock, None if exact else self._requests.wire)

    def assign_flat(self, keys: Sequence[str], flat: torch.Tensor) -> Handle:
        """Overwrite values, from any worker, while nobody pushes or pulls them."""
        self._require_worker("assign_flat")
        self._keys.require_flat(keys, flat, "assign_flat", None)
        return self._requests.assign(tuple(keys), flat)

    def optimizer_state(self, part: Slice) -> Handle:
        """Ask for what the optimizer remembers of a slice (one of ``placement``), between two steps: ``wait()`` returns
        a dict like torch's ``optimizer.state[tensor]``, mostly empty before the first update."""
        self._require_worker("optimizer_state")
        return self._requests.move_state(part, None, self.clock)

    def set_optimizer_state(self, part: Slice, state: dict[str, Any]) -> Handle:
        """Overwrite what the optimizer remembers of a slice, from any worker, while nobody pushes."""
        self._require_worker("set_optimizer_state")
        return self._requests.move_state(part, state, self.clock)

    @property
    def bytes_sent(self) -> int:
        """How many bytes this worker has sent to all servers."""
        return self._client.bytes_sent

    def step(self, *, finite: bool = True) -> Handle:
        """End this worker's clock: what it pushed in it is complete. Not collective, and does not wait. ``finite``:
        whether all that was pushed is, as far as this worker knows. ``wait()`` of the handle returns a
        :class:`ClockVerdict` where servers agree on one (``max_grad_norm`` or ``skips``), once all workers have ended
        the clock; else None, at once."""
        self._require_worker("step")
        self._client.raise_unasked(self.clock)
        handle = self._requests.end_clock(self.clock, bool(finite), self._verdict_of_clock())
        self.clock += 1
        return handle

    def poll(self) -> None:
        """Let messages move on, without waiting; call it now and then during long computations."""
        self._client.poll()

    def version(self, key: str) -> int:
        """The version of the value that was last pulled: 1 at first, and one more for each update. 0: nothing was
        pulled yet."""
        self._keys.entry(key)
        return self._requests.versions.get(key, 0) if self.role == "worker" else 0

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(self._keys.entry_of)

    # Counting, reporting, leaving.

    def ticket(self) -> int:
        """The next of 0, 1, 2, ..., counted for all workers together: who is free takes the next piece of work."""
        self._require_worker("ticket")
        order = self.clock, -2, 0
        return int(self._requests.ask(0, Header(Kind.TICKET), order, "ticket", complete=_take_ticket).wait())

    def report(self) -> dict[str, Any]:
        """The history of all servers so far: ``staleness`` (how many reads lacked 0, 1, ... clocks of the slowest
        worker), ``updates``, and the workers' ``clocks``."""
        self._require_worker("report")
        staleness: dict[int, int] = {}
        updates, clocks = 0, [0] * self.group.size
        for server in range(len(self.servers)):
            reply = json.loads(self._requests.ask(server, Header(Kind.REPORT), (self.clock, 2, 0), "report").wait())
            updates += reply["updates"]
            clocks = [max(pair) for pair in zip(clocks, reply["clocks"], strict=True)]
            for stale, reads in reply["staleness"].items():
                staleness[int(stale)] = staleness.get(int(stale), 0) + reads
        return {"staleness": dict(sorted(staleness.items())), "updates": updates, "clocks": clocks}

    def leave(self) -> None:
        """This worker pushes no more, and nobody waits for its clock any longer; it may still pull. Returns when the
        servers know it."""
        self._require_worker("leave")
        self._requests.ask_all(Header(Kind.LEAVE, clock=self.clock), (self.clock, 2, 0), "leave").wait()
        self._left = True
        self._client.at_clock(_NO_CLOCK)

    def close(self) -> None:
        """This worker needs the servers no more; they return when all workers have closed. ``commlab.shutdown()`` and
        the end of the program close the store, and so does Python when nobody has the store any longer. The second time
        it does nothing."""
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            self._ending.begin()
            self._requests.close(self.clock).wait()
            self._ending.complete()

    # Inside.

    def _require_worker(self, what: str) -> None:
        if self.role == "server":
            raise UsageError(f"rank {self._keys.rank}: {what}() is for workers, and this rank was a server")
        if self._closed:
            raise UsageError(f"rank {self._keys.rank}: {what}() on a parameter server that was closed")
        if by := recorder():
            raise refusal(self._keys.rank, f"{what}()", by)
        if self._left and what in ("push", "push_pull", "push_flat", "step", "leave"):
            raise UsageError(f"rank {self._keys.rank}: {what}() after leave(), after which a worker only pulls")

    def _hyper_values(self) -> list[Any]:
        """All that :meth:`_hypers` is made of."""
        found: list[Any] = [self.lr_factor, self.grad_scale]
        for entry in () if self.optimizer is None else self.optimizer.param_groups:
            for key, value in entry.items():
                if key not in hypers.NOT_SENT:
                    found += (key, value)
        return found

    def _hypers(self) -> bytes:
        try:
            return hypers.encode(self.optimizer, self._optimizer_groups, self.lr_factor, self.grad_scale)
        except UsageError as error:
            raise UsageError(f"rank {self._keys.rank}: push at clock {self.clock}: {error}") from None

    def _verdict_of_clock(self) -> Callable[[PendingRequests], None] | None:
        # Knows the store no more: a store that nobody has any longer is to go at once.
        return partial(_take_verdict, self.grad_scale) if self.agrees else None


def _take_verdict(scale: float, call: PendingRequests) -> None:
    assert call.answer is not None
    call.result = ClockVerdict(call.answer.value**0.5 / scale, call.answer.flag)


def _take_ticket(call: PendingRequests) -> None:
    assert call.answer is not None
    call.result = call.answer.clock


def _transports(everyone: Group, alone: bool) -> tuple[Any, Any]:
    """This rank's transport as a worker, and its transport as a server: the same one, except for a rank alone, which is
    both worker and server."""
    if alone:
        near, far = SimNetwork(2).transports()
        return near, far
    transport = everyone.split(range(everyone.size), any_order=True)
    return transport, transport
