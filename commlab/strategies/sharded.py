"""``ps`` and ``dps``: gradients are pushed to the owners of the parameters, who update them; all ranks pull the result.

    ps  (one shard)     push: reduce to rank 0          rank 0: norm, clip, optimizer       pull: broadcast from rank 0
    dps (P shards)      push: reduce-scatter            rank r: these three on its shard    pull: allgather
    dps (N nodes of L)  push: the same on each node,    local rank l: these three on its    pull: nothing
                        and an allreduce of each shard  shard, alike on all nodes
    ps  (N nodes of L)  push: the same on each node,    rank 0: clip, optimizer             pull: broadcast of each
                        and a reduce of each shard                                          shard to the nodes

One code for all: each bucket is cut into chunks, one per owner (:mod:`.owners`), so shards are balanced to a cache
line per bucket; :mod:`.layout` lays them out. Optimizer state exists once, or where the node is the unit once on each
node (:mod:`.holders`, :mod:`.pushes`). All ranks train.

Cost per step, n numbers: dps sends 2 n (P-1)/P per rank, as an allreduce does, and updates n/P; ps sends n from every
worker, and its server receives n (P-1), or as a chain (algorithm ring) n, and updates n. Where the node is the unit
a node of ps sends n and receives n, and the link of the server's node carries n (N-1) each way, or as a chain n
(:mod:`.server_pushes`). M. Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014; S.
Rajbhandari et al., "ZeRO", SC 2020 (stage 1: sharded optimizer state).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..checkpoint.whole import regroup
from ..chunks import Range
from ..collectives.halves import gather_chunks_async, reduce_chunks_async
from ..gradients.absent import AbsentGradients
from ..gradients.bucket import Bucket
from ..gradients.hooks import Waitable
from ..native.norm import norm_squared
from ..ps.elementwise import require_elementwise, require_nothing_whole
from ..runtime.control import exchange_records
from ..runtime.group import Group
from .changes import Roster
from .copies import copy_from_rank_0, require_alike, tensors_of
from .edited import EditedGradients, counted
from .edits import Edits
from .flat import own_memory
from .holders import choose
from .layout import Layout
from .options import Options
from .owners import all_owners, one_owner, owned
from .protocol import Strategy
from .pushes import Pushes
from .reduced import ReducedGradient
from .server_pushes import ServerPushes
from .start import give_memory_back, start, start_buckets
from .verdict import Verdict, unused_on_all

INSTEAD = (
    "To clip the norm, give commlab.strategy() max_grad_norm=; for everything else there is "
    "engine.reduced_gradients(), and engine.gradient_norms() for logs"
)
ONE_COPY = (
    "under strategy {} the ranks of a node share one copy of the parameters, which every rank's write reaches, while "
    "others compute with it"
)


class Sharded(Strategy):
    """Owners in lockstep. Parameters become views of flat buffers, one per bucket; ``p.grad`` is None after a step, and
    between backward and step it only says that it is not there.

    In the window these buffers exist once for all ranks: an owner's update is seen by everyone, and a pull is a wait.
    Nobody updates while another still computes: owners begin only after the verdict, which follows the last bucket of
    every rank.
    """

    keeps_gradients = False
    shards_state = True
    node_pushes: type[Pushes]
    """How gradients leave where the node is the unit."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        require_elementwise(optimizer, options.elementwise)
        require_nothing_whole(optimizer)
        self.training = training = start(model, optimizer, group, options, moves=self.name)
        every_node_updates = self.node_pushes.EVERY_NODE_UPDATES
        levels, training.shard_reason = choose(group, options, every_node_updates=every_node_updates)
        self._pushes: Pushes | None = None
        """Where the node is the unit: how gradients leave."""
        if levels is not None:
            training.levels, training.window = levels, levels.node.window
            if every_node_updates:
                training.holders, training.across = levels
            self._pushes = self.node_pushes(group, levels, options.algorithm)
        self._retired: list[torch.Tensor] = []
        """Memory of the window in which buckets and parameters lay before the last plan: graphs of this step's forward
        may still read it."""
        self._plan()

    def _plan(self) -> None:
        """Cut what is trained into buckets and chunks, and move parameters into flat buffers."""
        training, group = self.training, self.training.group
        self.buckets = start_buckets(training, self.launch, keep_gradients=False)
        if self._pushes is not None:
            self._pushes.plan(self.buckets.buckets)
        self._layout = layout = Layout(training, self.buckets.buckets, self.owners)
        training.masters.own(layout.pieces())
        pieces = training.masters.pieces
        absent = AbsentGradients(
            [(item.name, item.tensor) for item in training.parameters]
            + [(piece.parameter.name, piece.tensor) for piece in pieces],
            self.name,
            INSTEAD,
        )
        self._edited: EditedGradients | None = None
        """The reduced gradient, where the user may have edited it."""
        if training.in_window:
            training.sharers.barrier()  # its rank 0 has written the shared parameters
        self.edits = Edits(
            group,
            training.parameters,
            instead=ONE_COPY.format(self.name) if layout.one_copy else training.masters.instead,
            pieces=[(f"the optimizer's part of parameter {piece.parameter.name!r}", piece.tensor) for piece in pieces],
            shared=[(f"memory of {each.text}", each.flat) for each in layout.shared if each.flat.numel()],
            absent=absent,
            lying=(self.name, training.structure),
        )

    @staticmethod
    @abstractmethod
    def owners(numel: int, ranks: int) -> tuple[Range, ...]:
        """Who owns what of a bucket of ``numel`` numbers: a chunk for each rank."""

    # A step.

    def backward(self, loss: torch.Tensor | None, retain_graph: bool) -> None:
        if self._pushes is not None and self.buckets.syncing:
            self._pushes.settle()
        if loss is not None:
            loss.backward(retain_graph=retain_graph)

    def launch(self, bucket: Bucket) -> Waitable:
        training, chunks = self.training, self._layout.chunks[bucket.index]
        if self._pushes is not None:
            return self._pushes.launch(bucket)
        squares = bucket.squares if training.wants_norm else None
        return reduce_chunks_async(
            bucket.flat,
            chunks,
            "mean",
            bucket.name,
            training.options.algorithm,
            group=training.group,
            squares=squares,
        )

    def complete(self) -> None:
        self.edits.put_absent()

    def forget(self) -> None:
        self.edits.remove_absent()
        self._edited = None

    def reduced(self, scale: float) -> tuple[list[ReducedGradient], set[int]]:
        training = self.training
        self.buckets.wait()
        unused = unused_on_all(training.group, self.buckets.used, len(training.parameters))
        self._edited = EditedGradients(training, self._gradients(unused))
        return self._edited.pieces(scale), unused

    def _gradients(self, unused: set[int]) -> list[torch.Tensor | None]:
        """The reduced gradient of each of the masters' pieces, flat; None for ``unused`` parameters."""
        gradients: list[torch.Tensor | None] = []
        for (bucket, push), mine in zip(self.buckets.launched, self._layout.owned, strict=True):
            chunk = push.result if self._pushes is None else self._pushes.owned(bucket, push.result)
            gradients += [
                None if item.parameter.index in unused else chunk[item.in_chunk.start : item.in_chunk.stop]
                for item in mine
            ]
        return gradients

    def agree(self) -> Verdict:
        training, buckets, edits = self.training, self.buckets, self.edits
        squares, finite = 0.0, buckets.finite
        edits.remove_absent()
        refusal = edits.refusal()
        if self._edited is not None:
            squares = self._edited.squares()
            finite = math.isfinite(squares)
            self._edited.require_alike()
        elif self._pushes is not None and training.wants_norm:
            squares = norm_squared(counted(training.across, push.result) for _, push in buckets.launched)
        elif training.wants_norm:
            squares = sum(bucket.squares.of(push.result) for bucket, push in buckets.launched)
        verdict = training.record.agree(squares, finite, buckets.used, len(training.parameters), edits.digest(refusal))
        edits.require_alike(verdict.edits, refusal)
        return verdict

    def update(self, factor: float, unused: set[int]) -> None:
        gradients = self._gradients(unused) if self._edited is None else self._edited.tensors
        self.training.masters.step_pieces(gradients, factor)

    def pull(self) -> None:
        rank = self.training.holders.rank
        mirrored = [
            (each.mirror, chunks[rank])
            for each, chunks in zip(self._layout.flats, self._layout.chunks, strict=True)
            if each.mirror is not None
        ]
        for mirror, own in mirrored:
            mirror.to_host(own)
        for mirror, _ in mirrored:
            mirror.wait()
        self._gather()
        # These copies are over before an owner writes again: every rank's next gradients follow them on one stream.
        for mirror, _ in mirrored:
            mirror.to_device()
        if self._retired:
            # All ranks' graphs of this step are done with, or the barrier above would not have let anybody pass.
            give_memory_back(self.training, self._retired)
            self._retired = []

    def _gather(self) -> None:
        """Bring every owner's chunk of the parameters to all ranks."""
        group, algorithm = self.training.group, self.training.options.algorithm
        if self._pushes is not None:
            self._pushes.pull([each.host for each in self._layout.flats])
            return
        if self.training.window is not None:
            group.barrier()
            return
        pulls = [
            gather_chunks_async(each.host, chunks, f"parameters of bucket {index}", algorithm, group=group)
            for index, (each, chunks) in enumerate(zip(self._layout.flats, self._layout.chunks, strict=True))
        ]
        for pull in pulls:
            pull.wait()

    # Between steps.

    def finish(self, last: bool) -> None:
        """What optimizers have written outside of their step (an exchange with averages), all ranks get."""
        training = self.training
        moved = b"1" if not training.masters.instead and self.edits.written_pieces() else b"0"
        if b"1" in exchange_records(training.group, moved, "parameters written by the optimizer"):
            self.pull()
            self.edits.exchanged()

    def replicas(self) -> Iterator[tuple[str, Any]]:
        return iter(()) if self._layout.one_copy else super().replicas()

    def compare_shards(self) -> None:
        training = self.training
        if training.levels is not None:
            local_ranks = training.group.topology.local_ranks
            require_alike(training.group, training.steps, self._copies(), local_ranks=local_ranks)

    def _copies(self) -> Iterator[tuple[str, Any]]:
        """What other nodes have, too, of what this rank answers for: here what it owns."""
        for piece in self.training.masters.pieces:
            yield f"{piece.text}, or its master", piece.tensor
            for key, value in self.training.optimizer.state.get(piece.tensor, {}).items():
                yield f"the optimizer's {key!r} of {piece.text}", value

    @property
    def saves_state(self) -> bool:
        return self.training.across is None or self.training.across.rank == 0

    def update_parameters(self, change: Callable[[torch.nn.Module], object]) -> None:
        training, group = self.training, self.training.group
        group.barrier()
        if not self._layout.one_copy:
            super().update_parameters(change)
            group.barrier()
            return
        shared = {item.name for item in training.parameters}
        if training.sharers.rank == 0:
            with torch.no_grad():
                change(training.model)
            if training.levels is not None:
                copies = [entry for entry in tensors_of(training.model) if entry[0] in shared]
                copy_from_rank_0(training.levels.across, copies)
        group.barrier()
        training.masters.follow()
        # What is not trained, and buffers, every rank has for itself.
        copy_from_rank_0(group, [entry for entry in tensors_of(training.model) if entry[0] not in shared])

    def replan(self, roster: Roster) -> None:
        self._give_back(roster.members, state=True)
        self._retired += self._memory()
        self.training.replan(roster)
        self._plan()

    def _give_back(self, members: Sequence[Sequence[torch.Tensor]], *, state: bool) -> None:
        """Let the optimizer's groups have ``members``, whole parameters, and these memory of their own. ``state``: with
        all that the ranks' optimizers remember. Collective."""
        training = self.training
        self.forget()
        if state:
            training.give_back(members, sharded=True)
        else:
            training.optimizer.state.clear()
            regroup(training.optimizer, members)
        own_memory(training)
        self.buckets.close()

    def _memory(self) -> list[torch.Tensor]:
        """What lies in this rank's area of the window."""
        shared = [each.host for each in self._layout.flats] if self.training.sharers.rank == 0 else []
        sums = [] if self._pushes is None else self._pushes.memory
        return [*(bucket.flat for bucket in self.buckets.buckets), *shared, *sums]

    def close(self, *, state: bool) -> None:
        training = self.training
        self._give_back(training.members, state=state)
        if training.in_window:
            training.group.barrier()
        give_memory_back(training, [*self._memory(), *self._retired])
        if training.levels is not None:
            training.levels.across.close()
            training.levels.node.close()


class SingleServer(Sharded):
    name = "ps"
    owners = staticmethod(one_owner)
    node_pushes = ServerPushes

    def _copies(self) -> Iterator[tuple[str, Any]]:
        # Rank 0 owns all, and each node has a copy of the parameters alone: every rank looks at its shard of them.
        assert self._pushes is not None
        for each, chunks in zip(self._layout.flats, self._pushes.chunks, strict=True):
            own = chunks[self.training.sharers.rank]
            numbers = each.flat[own.start : own.stop]
            for item in owned(each.bucket, own):
                text = f"{item.parameter.name!r} [{item.start}:{item.stop}]"
                yield text, numbers[item.in_chunk.start : item.in_chunk.stop]


class ShardedServer(Sharded):
    name = "dps"
    owners = staticmethod(all_owners)
    node_pushes = Pushes
