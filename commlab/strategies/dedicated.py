"""``ps`` and ``dps`` with dedicated servers: some ranks only serve, the others train and talk to them in messages.

    ps   servers=1        every worker pushes all its gradients to one server     n numbers each way on each worker's
    dps  servers=K >= 2   the same, in K shards balanced by bytes                 link, n W / K on each server's

    worker   backward, push b0 as soon as it is there, push b1 ... | end of clock | pull in forward order | next forward
    server   add in rank order; with clipping or fp16: agree on the norm; update  | answer

The same store as ``commlab.ParameterServer``, with the user's own optimizer on its shards. Under bsp the result is that
of every other strategy. Under ssp and asp each worker's gradient (the mean over its own samples) is an update of its
own, made with 1/W of the learning rate: so many more of them are made, and W of them go as far as one of bsp.
M. Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..checkpoint import pieces
from ..errors import CommlabError, UsageError
from ..gradients.bucket import Bucket, adjoining, plan
from ..gradients.hooks import GradientBuckets
from ..gradients.parameters import NamedParameter, named_parameters
from ..native.dtypes import WIRES
from ..ps.consistency import parse
from ..ps.messages import MESSAGE_BYTES
from ..ps.placement import Slice
from ..ps.store import ParameterServer
from ..runtime.control import raise_together
from ..runtime.group import Group
from . import server_state
from .engine import Strategy
from .flat import flatten, require_in_place
from .late_pulls import Pulls
from .options import Options
from .replicas import give_from_rank_0, tensors_of
from .verdict import Agreement

BUCKET_BYTES = 4 * MESSAGE_BYTES
"""The most that is packed at once, whatever ``bucket_bytes`` says: servers can be busy before a bucket is full."""


class Dedicated(Strategy):
    """On a server rank the constructor serves, and returns when all workers have closed their engines; ``role`` is
    "server" then, and the engine is of no use but for its ``store``. On workers ``group`` is that of the workers."""

    keeps_gradients = False
    shards_state = True

    def __init__(
        self, name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options
    ):
        assert options.servers is not None
        if any(not parameter.is_cpu for parameter in model.parameters()):
            raise UsageError(
                f"strategy {name} with dedicated servers works on the CPU, without Apex; leave servers out, or the "
                "model on the CPU"
            )
        consistency = parse(options.consistency)
        self._named = named = named_parameters(model, optimizer)
        averages = consistency.averages
        self.store = ParameterServer(
            [(item.name, item.tensor) for item in named],
            server_state.UsersOwn(optimizer, named),
            options.consistency,
            options.servers,
            group=group,
            wire=options.wire,
            max_grad_norm=options.max_grad_norm,
            # On a wire of 16 bits what does not fit becomes inf: nothing may be updated with it.
            skips=averages and (options.precision == "fp16" or options.wire is not None),
            groups={item.name: item.group for item in named},
            elementwise=options.elementwise,
        )
        self.name, self.role, self.averages = name, self.store.role, averages
        if self.role == "server":
            self.model, self.optimizer, self.group, self.options = model, optimizer, group, options
            self.parameters = named
            return
        optimizer.state.clear()  # the servers have it
        super().__init__(model, optimizer, self.store.group, options)
        assert self.buckets is not None
        if not averages:
            self.store.lr_factor = 1 / self.group.size
        self._flat_parameters = [flatten(bucket) for bucket in self.buckets.buckets]
        self._pulls = Pulls(model, self.store, self.buckets.buckets, self._flat_parameters, self._forward_waited)
        self._accounted_bytes = 0

    def _named_parameters(self) -> list[NamedParameter]:
        return self._named  # the optimizer has them no more

    def _make_buckets(self) -> GradientBuckets:
        self.in_window = False
        # One order for pushes and pulls: forward's, in which servers keep their parts; the optimizer's groups are
        # theirs to know.
        parameters = [replace(item, group=0) for item in self.parameters]
        planned = plan(parameters, min(self._bucket_bytes, BUCKET_BYTES), WIRES[self.options.wire])
        buckets = []
        for bucket in planned:
            members = bucket.parameters[::-1]
            buckets.append(Bucket(bucket.index, members, adjoining(members), bucket.dtype, bucket.flat))
        return GradientBuckets(
            buckets,
            self._launch,
            self._local_scale,
            self.store.poll,
            keep_gradients=False,
            overlap=self.options.overlap,
        )

    def _launch(self, bucket: Bucket) -> None:
        assert self.buckets is not None
        if not self.averages and not self.buckets.finite and self.options.wire is not None:
            raise CommlabError(
                f"rank {self.group.rank}: in step {self.steps} its gradient in {bucket.name} is not finite on wire "
                f"{self.options.wire} (an overflow, inf or NaN), and was not pushed; use wire bf16 or none"
            )
        used = [member.name for member in bucket.parameters if member.index in self.buckets.used]
        if stale := self._pulls.on_their_way(used):
            raise CommlabError(
                f"rank {self.group.rank}: in step {self.steps} {', '.join(stale)} had a gradient while the new value "
                "was still on its way: it was read by a module that does not have it; give overlap_pulls=False "
                "(--overlap-pulls off)"
            )
        self.store.grad_scale = self.precision.scale
        for names, flat in self._used(bucket):
            self._launched.append((bucket, self.store.push_flat(names, flat)))

    def _used(self, bucket: Bucket) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
        """The bucket's parameters that have a gradient, those that adjoin together: servers update what was pushed."""
        assert self.buckets is not None
        used = [member.index in self.buckets.used for member in bucket.parameters]
        first = 0
        while first < len(used):
            last = first
            while last < len(used) and used[last]:
                last += 1
            if last > first:
                names = tuple(member.name for member in bucket.parameters[first:last])
                yield names, bucket.flat[bucket.ranges[first].start : bucket.ranges[last - 1].stop]
            first = last + 1

    def _local_scale(self) -> float:
        if self.averages:
            return super()._local_scale()
        return 1 / max(1, self._weight.count) if self._weight.counted else 1.0

    def _agree(self) -> Agreement:
        assert self.buckets is not None
        ended = self.store.step(finite=self.buckets.finite)
        if not self.store.agrees:
            return Agreement(0.0, True, set())
        verdict = ended.wait()
        return Agreement((verdict.norm * self.precision.scale) ** 2, verdict.finite, set())

    def _update(self, clip: float, unused: set[int]) -> None:
        self.optimizer.step()  # of stand-ins without gradients: so that schedulers know there was a step

    def _pull(self) -> None:
        require_in_place(self, self._flat_parameters)
        self._pulls.ask()
        if self.options.overlap_pulls:
            self._pulls.end_step()
        else:
            self._pulls.wait_for_all()
        sent = self.store.bytes_sent
        self.group.bytes_sent += sent - self._accounted_bytes
        self._accounted_bytes = sent

    def _forward_waited(self, seconds: float) -> None:
        self.times.exchange_s += seconds
        self.times.forward_wait_s += seconds

    @property
    def serving(self) -> str:
        ranks = ", ".join(map(str, self.store.servers))
        return f"{self.store.placement.describe()}; served by rank {ranks}; consistency {self.options.consistency}"

    def serving_report(self) -> dict[str, str]:
        self.group.barrier()
        if self.group.rank:
            return {}
        said = self.store.report()
        reads = sum(said["staleness"].values())
        histogram = ", ".join(f"{stale}: {count / reads:.1%}" for stale, count in said["staleness"].items())
        return {
            "servers": f"{len(self.store.servers)}, {said['updates']} updates of parts",
            "staleness": f"{histogram} of {reads} reads (clocks of the slowest worker that they lacked)",
            "clocks": " ".join(map(str, said["clocks"])) + " (steps that each worker made)",
        }

    def turns(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        if self.averages:
            yield from super().turns(start, stop)
            return
        while (turn := start * self.group.size + self.store.ticket()) < stop * self.group.size:
            yield divmod(turn, self.group.size)

    def settle(self, last: bool = False) -> None:
        if last and not self.averages:
            self.store.leave()
        self.group.barrier()
        self._pulls.ask(exact=True)
        self._pulls.wait_for_all()

    def update_parameters(self, change: Callable[[torch.nn.Module], object]) -> None:
        self.settle()
        self.group.barrier()
        super().update_parameters(change)
        if self.group.rank == 0:
            for unit in self._pulls.units:
                self.store.assign_flat(unit.names, unit.flat).wait()
        self.settle()
        trained = {item.name for item in self.parameters}
        give_from_rank_0(self.group, [entry for entry in tensors_of(self.model) if entry[0] not in trained])

    def _own_parts(self) -> list[Slice]:
        if not self.averages:
            raise UsageError(
                f"rank {self.group.rank}: under {self.options.consistency} workers are never at the same step, so no "
                "state of one step can be saved or restored; use bsp"
            )
        return server_state.share(self.store, self.group.rank, self.group.size)

    def _optimizer_state(self) -> dict[str, Any]:
        own = self._own_parts()
        self._pulls.wait_for_all()  # then all updates of the last step are made
        return server_state.state(self.store, own, self.optimizer)

    def _load_optimizer_state(self, parts: Sequence[dict[str, Any]]) -> None:
        self._pulls.wait_for_all()
        own = self._own_parts()
        found = raise_together(
            self.group, lambda: server_state.collect(self.store, own, self.optimizer, self.parameters, parts)
        )
        # Every worker has what it needs, and nobody has a step under way, nor begins one before all servers are told.
        pieces.load_groups(self.optimizer, parts)
        raise_together(self.group, lambda: server_state.tell(self.store, own, found))

    def close(self) -> None:
        """Also gives this worker parameters of its own again. Servers return when all workers have closed."""
        if self.role == "server":
            return
        self._pulls.close()
        for item in self.parameters:
            item.tensor.data = item.tensor.data.clone()
        super().close()
        self.store.close()
