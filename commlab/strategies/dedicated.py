"""``ps`` and ``dps`` with dedicated servers: some ranks only serve, the others train and talk to them in messages.

    ps   servers=1        every worker pushes all its gradients to one server     n numbers each way on each worker's
    dps  servers=K >= 2   the gradients go to K shards balanced by bytes          link, n W / K on each server's

    worker   backward, push b0 as soon as it is there, push b1 ... | end of clock | pull in forward order | next forward
    server   add in rank order; with clipping or fp16: agree on the norm; update  | answer

The store is that of ``commlab.ParameterServer``, with the user's own optimizer on its shards. Under bsp the result is
that of every other strategy. Under ssp and asp each worker's gradient (the mean over its own samples) is an update of
its own, made with 1/W of the learning rate: so many more of them are made, and W of them go as far as one of bsp.
M. Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..checkpoint import pieces
from ..checkpoint.whole import regroup, take_back
from ..errors import AgreedError, CommlabError, NotFiniteError, UsageError
from ..gradients.absent import AbsentGradients
from ..gradients.bucket import Bucket
from ..gradients.hooks import GradientBuckets, Waitable
from ..gradients.parameters import members_of
from ..job.dynamo import uncompiled
from ..ps.consistency import parse
from ..ps.elementwise import require_nothing_whole
from ..ps.placement import Slice
from ..ps.store import ParameterServer
from ..runtime.control import raise_together
from ..runtime.group import Group
from . import server_state
from .changes import Roster
from .copies import start_from_rank_0
from .edits import Edits
from .flat import own_memory
from .late_pulls import Pulls
from .options import Options
from .protocol import Strategy
from .reduced import ReducedGradient
from .served_buckets import BucketPushes, flattened, plan_served, with_gradients
from .start import require_trainable, start
from .verdict import Verdict


class Dedicated(Strategy):
    """On a server rank the constructor serves, and returns when all workers have closed their engines. On workers the
    group of :attr:`training` is that of the workers."""

    keeps_gradients = False
    shards_state = True
    drops_steps = False

    def __init__(
        self, name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options
    ):
        assert options.servers is not None
        if any(not parameter.is_cpu for parameter in model.parameters()):
            raise UsageError(
                f"strategy {name} with dedicated servers works on the CPU, without Apex; leave servers out, or the "
                "model on the CPU"
            )
        if isinstance(model, torch.jit.ScriptModule):
            raise UsageError(
                f"strategy {name} with dedicated servers waits for parameters in hooks of the model, and one that is "
                "TorchScript takes none; leave servers out, or script parts of the model only"
            )
        require_nothing_whole(optimizer)
        averages = parse(options.consistency).averages
        named = raise_together(group, lambda: require_trainable(model, optimizer, options, moves=name))
        members, trained = members_of(optimizer), named.trained
        # Servers take the optimizer's state from their own optimizer, and rank 0 may be the only one that has it.
        start_from_rank_0(group, model, optimizer, options, name)
        self.store = store = ParameterServer(
            [(item.name, item.tensor) for item in trained],
            server_state.UsersOptimizer(optimizer, trained),
            options.consistency,
            options.servers,
            group=group,
            wire=options.wire,
            max_grad_norm=options.max_grad_norm,
            # On a wire of 16 bits a number that does not fit becomes inf: nothing may be updated with it.
            skips=averages
            and (options.precision == "fp16" or options.wire is not None or options.nonfinite != "torch"),
            groups={item.name: item.group for item in trained},
            elementwise=options.elementwise,
        )
        self.name, self.role, self.averages = name, store.role, averages
        if self.role == "server":
            # It computes nothing, and the workers are gone: there is nobody to agree with on autocast.
            idle = replace(options, autocast="off")
            optimizer.state.clear()  # of slices, which nobody knows any more
            regroup(optimizer, members)
            self.training = start(model, optimizer, group, idle, named=named, synchronize=lambda: None)
            self.buckets = GradientBuckets(
                [], self.launch, lambda: 1.0, lambda: None, keep_gradients=False, overlap=options.overlap
            )
            self.edits = Edits(group, ())
            return
        for item in trained:
            optimizer.state.pop(item.tensor, None)  # the servers have it
        self.training = start(
            model, optimizer, store.group, options, named=named, members=members, synchronize=lambda: None
        )
        self.training.window = None  # servers are sent messages
        self.buckets = self._start_buckets()
        if not averages:
            store.lr_factor = 1 / store.group.size
        flats = [flattened(bucket) for bucket in self.buckets.buckets]
        self.pulls = Pulls(model, store, flats, self._forward_waited)
        self._accounted_bytes = 0
        self.edits = Edits(
            self.training.group,
            self.training.parameters,
            instead="the next pull overwrites it from the servers",
            absent=AbsentGradients(
                [(item.name, item.tensor) for item in self.training.parameters],
                f"{name} with dedicated servers",
                "To clip the norm, give commlab.strategy() max_grad_norm=",
            ),
            lying=(name, self.training.structure),
        )

    def _start_buckets(self) -> GradientBuckets:
        training, counts = self.training, self.training.counts
        return GradientBuckets(
            plan_served(training),
            self.launch,
            counts.scale_for_mean if self.averages else counts.scale_alone,
            self.store.poll,
            keep_gradients=False,
            overlap=training.options.overlap,
        )

    # A step.

    def complete(self) -> None:
        self.edits.put_absent()

    def forget(self) -> None:
        self.edits.remove_absent()

    def reduced(self, scale: float) -> tuple[list[ReducedGradient], set[int]]:
        raise UsageError(
            f"strategy {self.name} with dedicated servers: only the servers have the reduced gradient. Give "
            "max_grad_norm= to clip its norm; leave servers= out to edit the reduced gradient of ranks' own shards"
        )

    def launch(self, bucket: Bucket) -> Waitable:
        training, options = self.training, self.training.options
        watched = options.wire is not None or options.nonfinite == "error"
        if not self.averages and watched and not (self.buckets.finite and training.record.loss_is_finite()):
            raise NotFiniteError(
                f"rank {training.group.rank}: in step {training.steps} its loss, or its gradient of "
                f"{self.buckets.not_finite!r}, is not finite on wire {options.wire or 'none'} (an overflow, inf or "
                "NaN), and was not pushed; use wire bf16 or none, or a smaller learning rate"
            )
        used = [member.name for member in bucket.parameters if member.index in self.buckets.used]
        if late := self.pulls.on_their_way(used):
            raise CommlabError(
                f"rank {training.group.rank}: in step {training.steps} {', '.join(late)} had a gradient while the new "
                "value was still on its way: it was read by a module that does not have it; give overlap_pulls=False "
                "(--overlap-pulls off)"
            )
        self.store.grad_scale = training.precision.scale
        pushed = with_gradients(bucket, self.buckets.used)
        return BucketPushes([self.store.push_flat(names, flat) for names, flat in pushed])

    def agree(self) -> Verdict:
        """The servers' verdict, where they need one; each of them passes over parameters that nobody has pushed."""
        self.edits.remove_absent()
        refusal = self.edits.refusal()
        if not self.averages:
            if refusal:
                self.edits.put_absent()
                raise UsageError(refusal)
            self.store.step(finite=self.buckets.finite)
            return Verdict(0.0, True, set())
        # Among the workers: servers compare what was pushed with what, but could tell one worker alone.
        try:
            told = self.training.record.agree(
                0.0, self.buckets.finite, None, len(self.training.parameters), self.edits.digest(refusal)
            )
            self.edits.require_alike(told.edits, refusal)
        except CommlabError:
            # No worker's clock has ended: step() can be called again, and pulls over what it was told of.
            self.edits.put_absent()
            self.edits.note()
            raise
        ended = self.store.step(finite=told.finite)
        if not self.store.agrees:
            return told._replace(squares=0.0, finite=True)
        answer = ended.wait()
        return told._replace(
            squares=(answer.norm * self.training.precision.scale) ** 2, finite=told.finite and answer.finite
        )

    def update(self, factor: float, unused: set[int]) -> None:
        # Of stand-ins without gradients, so that schedulers know that there was a step: servers clip and update.
        uncompiled(self.training.optimizer.step)

    def pull(self) -> None:
        training = self.training
        self.pulls.ask()
        if training.options.overlap_pulls:
            self.pulls.end_step()
        else:
            self.pulls.wait_for_all()
        sent = self.store.bytes_sent
        training.group.bytes_sent += sent - self._accounted_bytes
        self._accounted_bytes = sent

    def _forward_waited(self, seconds: float) -> None:
        self.training.forward_wait_s += seconds

    # Between steps.

    def replicas(self) -> Iterator[tuple[str, Any]]:
        # Without lockstep copies are of different ages, and those that are on their way are nobody's yet.
        late = not self.averages or self.training.options.overlap_pulls
        return iter(()) if late else super().replicas()

    def assignments(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        if self.averages:
            yield from super().assignments(start, stop)
            return
        size = self.training.group.size
        while (ticket := start * size + self.store.ticket()) < stop * size:
            yield divmod(ticket, size)

    def finish(self, last: bool) -> None:
        if last and not self.averages:
            self.store.leave()
        self.training.group.barrier()
        self.pulls.ask(exact=True)
        self.pulls.wait_for_all()
        self.edits.exchanged()

    def update_parameters(self, change: Callable[[torch.nn.Module], object]) -> None:
        group = self.training.group
        self.finish(last=False)
        group.barrier()
        super().update_parameters(change)
        if group.rank == 0:
            for unit in self.pulls.units:
                self.store.assign_flat(unit.names, unit.flat).wait()
        self.finish(last=False)

    def _own_slices(self) -> list[Slice]:
        """The slices that this worker saves and restores."""
        group = self.training.group
        if not self.averages:
            raise UsageError(
                f"rank {group.rank}: under {self.training.options.consistency} workers are never at the same step, so "
                "no state of one step can be saved or restored; use bsp"
            )
        return server_state.share(self.store, group.rank, group.size)

    def state(self) -> dict[str, Any]:
        own = self._own_slices()
        self.pulls.wait_for_all()  # then all updates of the last step are made
        return server_state.state(self.store, own, self.training.optimizer)

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        self.pulls.wait_for_all()
        own, group, optimizer = self._own_slices(), self.training.group, self.training.optimizer
        parameters = self.training.parameters
        found = raise_together(group, lambda: server_state.collect(self.store, own, optimizer, parameters, states))
        # Every worker has what it needs, and nobody has a step under way, nor begins one before all servers have it.
        pieces.load_groups(optimizer, states)
        raise_together(group, lambda: server_state.assign(self.store, own, found))

    @property
    def serving(self) -> str:
        ranks = ", ".join(map(str, self.store.servers))
        consistency = self.training.options.consistency
        return f"{self.store.placement.describe()}; served by rank {ranks}; consistency {consistency}"

    def serving_report(self) -> dict[str, str]:
        self.training.group.barrier()
        if self.training.group.rank:
            return {}
        report = self.store.report()
        reads = sum(report["staleness"].values())
        histogram = ", ".join(f"{stale}: {count / reads:.1%}" for stale, count in report["staleness"].items())
        return {
            "servers": f"{len(self.store.servers)}, {report['updates']} updates of parts",
            "staleness": f"{histogram} of {reads} reads (clocks of the slowest worker that they lacked)",
            "clocks": " ".join(map(str, report["clocks"])) + " (steps that each worker made)",
        }

    def replan(self, roster: Roster) -> None:
        """Parameters may be frozen, and trained again: servers pass over what nobody pushes."""
        training = self.training
        known = {id(item.tensor): item for item in training.parameters}
        unknown = [item.name for item in roster.named.trained if id(item.tensor) not in known]
        everything = [*roster.named.trained, *roster.named.frozen]
        gone = [item.name for key, item in known.items() if key not in {id(each.tensor) for each in everything}]
        regrouped = [item.name for item in everything if item.group != known.get(id(item.tensor), item).group]
        if unknown or gone or regrouped:
            raise AgreedError(
                f"{', '.join(map(repr, unknown or gone or regrouped))}: the servers of strategy {self.name} keep the "
                "parameters and groups that they had at first; call engine.close() on all ranks and build a new engine "
                "with commlab.strategy(), or do without servers"
            )
        training.agreed = roster.named

    def close(self, *, state: bool) -> None:
        """Servers return when all workers have closed."""
        training = self.training
        found: dict[str, Any] = {}
        if state:
            self.finish(last=True)
            # Nobody pushes any more, so all updates are made, under every consistency.
            own = server_state.share(self.store, training.group.rank, training.group.size)
            found = server_state.state(self.store, own, training.optimizer)["pieces"]
        self.pulls.close()
        self.forget()
        own_memory(training)
        self.buckets.close()
        self.store.close()
        regroup(training.optimizer, training.members)
        if state:
            take_back(training.group, training.optimizer, found, training.parameters)
