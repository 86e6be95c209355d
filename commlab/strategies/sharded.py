"""``ps`` and ``dps``: gradients are pushed to the owners of the parameters, who update them; all ranks pull the result.

    ps  (one shard)     push: reduce to rank 0          rank 0: norm, clip, optimizer      pull: broadcast from rank 0
    dps (P shards)      push: reduce-scatter            rank r: the same on its shard      pull: allgather

The same code, one shard or many: each bucket is cut into chunks, one per owner; ``ps`` gives rank 0 all of it, ``dps``
gives every rank an equal part of every bucket, whatever the tensors' borders, so shards are balanced to a cache line
per bucket. Optimizer state exists once. All ranks train.

Cost per step, n numbers: dps sends 2 n (P-1)/P per rank, as an allreduce does, and updates n/P; ps sends n from every
worker, and its server receives n (P-1), or as a chain (algorithm ring) n, and updates n. M. Li et al., "Scaling
distributed machine learning with the parameter server", OSDI 2014; S. Rajbhandari et al., "ZeRO", SC 2020 (stage 1:
sharded optimizer state).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch

from ..checkpoint import pieces
from ..chunks import Range, split, whole_at
from ..collectives.halves import gather_chunks_async, reduce_chunks_async
from ..gradients.bucket import Bucket
from ..gradients.hooks import GradientBuckets
from ..gradients.mirror import Mirror, mirrors
from ..ps.elementwise import require_elementwise
from ..runtime.control import exchange_records
from ..runtime.group import Group
from ..window.memory import Place
from .engine import Strategy
from .flat import flatten, require_in_place
from .options import Options
from .replicas import give_from_rank_0, tensors_of

SERVER = 0
"""The rank that owns everything under ``ps``."""


class Colocated(Strategy):
    """Co-located servers in lockstep (BSP). Parameters become views of flat buffers, one per bucket; ``p.grad`` is None
    after step.

    In the window these buffers exist once for all ranks: an owner's update is seen by everyone, and a pull is a wait.
    Nobody updates while another still computes: owners begin only after the agreement that follows the last bucket of
    every rank.
    """

    keeps_gradients = False
    shards_state = True
    sharded: bool

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        require_elementwise(optimizer, options.elementwise)
        super().__init__(model, optimizer, group, options)
        assert self.buckets is not None
        self._chunks = [self._owners(bucket.numel) for bucket in self.buckets.buckets]
        self._mirrors: list[Mirror | None] = []
        """Of the flat parameters, where the model is on a GPU."""
        self._flat_parameters = [self._flatten(bucket) for bucket in self.buckets.buckets]
        if any(self._mirrors):
            self._pin(self._flat_parameters)
        self._shard = [piece for bucket in self.buckets.buckets for piece in self._cut(bucket)]
        pieces.rebind(optimizer, self._shard)
        if self.masters is not None:
            self.masters.whole.clear()  # this rank needs those of its pieces alone
        if self.in_window:
            group.barrier()  # rank 0 has written the shared parameters

    def _owners(self, numel: int) -> tuple[Range, ...]:
        # On cache lines: in the window neighbours' shards adjoin, and two ranks must not write one line in turn.
        return split(numel, self.group.size, align=16) if self.sharded else whole_at(SERVER, numel, self.group.size)

    def _make_buckets(self) -> GradientBuckets:
        made = super()._make_buckets()
        assert made is not None
        return made

    def _flatten(self, bucket: Bucket) -> torch.Tensor:
        """Move a bucket's parameters into one flat buffer, so that a pull writes them where they are used; in the
        window, into the one buffer of all ranks."""
        dtype, device = bucket.parameters[0].tensor.dtype, bucket.parameters[0].tensor.device
        flat = self._shared(bucket.numel, dtype) if self.in_window else torch.empty(bucket.numel, dtype=dtype)
        mirror = Mirror(flat, device) if mirrors(device) else None
        self._mirrors.append(mirror)
        fill = mirror is not None or not self.in_window or self.group.rank == 0
        flatten(bucket, self._where_used(bucket.index, flat), fill=fill)
        return flat

    @property
    def _device(self) -> torch.device:
        return self.parameters[0].tensor.device

    def _where_used(self, index: int, flat: torch.Tensor) -> torch.Tensor:
        """A bucket's flat parameters where the model has them: ``flat`` itself, or its mirror."""
        mirror = self._mirrors[index]
        return flat if mirror is None else mirror.device

    def _shared(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of local rank 0, seen by all. Collective."""
        window = self.group.window
        assert window is not None
        size_bytes = numel * dtype.itemsize
        place = Place(0, 0)
        if self.group.rank == 0:
            _, place = window.allocate(size_bytes)
        records = exchange_records(self.group, struct.pack("<qq", *place), "place of the parameters")
        return window.view(0, Place(*struct.unpack("<qq", records[0])), size_bytes).view(dtype)

    def _cut(self, bucket: Bucket) -> list[pieces.Piece]:
        """This rank's pieces of the bucket's parameters."""
        own = self._chunks[bucket.index][self.group.rank]
        flat = self._where_used(bucket.index, self._flat_parameters[bucket.index])
        found = []
        for member, place in zip(bucket.parameters, bucket.ranges, strict=True):
            common = place.intersect(own)
            if common.numel:
                tensor = flat[common.start : common.stop]
                if self.masters is not None and self.masters.separate:
                    master = self.masters.whole[member.index].view(-1)
                    tensor = master[common.start - place.start : common.stop - place.start].clone()
                if not member.tensor.dim():
                    # So that its state has no dimension either, like that of the whole.
                    tensor = tensor.view(())
                found.append(pieces.Piece(member, common.start - place.start, common.stop - place.start, tensor))
        return found

    def _pieces(self) -> list[pieces.Piece]:
        return self._shard

    def _launch(self, bucket: Bucket) -> None:
        chunks = self._chunks[bucket.index]
        handle = reduce_chunks_async(
            bucket.flat, chunks, "mean", bucket.name, self.options.algorithm, self.group, self._squares(bucket)
        )
        self._launched.append((bucket, handle))

    def _owned_squares(self) -> float:
        return sum(bucket.squares.of(handle.result) for bucket, handle in self._launched)

    def _bind_masters(self) -> None:
        """Done with the shard, once that is known."""

    def _unscale(self) -> bool:
        if self.masters is None:
            return True
        shard, gradients = iter(self._shard), []
        for bucket, handle in self._launched:
            own = self._chunks[bucket.index][self.group.rank]
            for place in bucket.ranges:
                common = place.intersect(own)
                if common.numel:
                    part = handle.result[common.start - own.start : common.stop - own.start]
                    master = next(shard).tensor
                    gradients.append(part.to(master.device).view(master.shape))
        return self.masters.unscale(gradients, [piece.tensor for piece in self._shard], 1.0 / self.precision.scale)

    def _update(self, clip: float, unused: set[int]) -> None:
        require_in_place(self, list(map(self._where_used, range(len(self._chunks)), self._flat_parameters)))
        if self.masters is not None:
            for piece in self._shard:
                if piece.parameter.index in unused:
                    piece.tensor.grad = None
            self._update_masters(clip * self.precision.scale)
            return
        shard = iter(self._shard)
        # A fused optimizer divides by a scale as it goes, which saves a pass over the gradient.
        scales = clip != 1.0 and getattr(self.optimizer, "_step_supports_amp_scaling", False)
        scales = scales and all(handle.result.dtype is torch.float32 for _, handle in self._launched)
        for bucket, handle in self._launched:
            own, sums = self._chunks[bucket.index][self.group.rank], handle.result
            if clip != 1.0 and not scales:
                # A 16-bit wire's sums must not be rounded a second time before they reach the parameter's dtype.
                sums = sums.mul_(clip) if sums.element_size() > 2 else sums.float() * clip
            for member, place in zip(bucket.parameters, bucket.ranges, strict=True):
                common = place.intersect(own)
                if common.numel:
                    gradient = sums[common.start - own.start : common.stop - own.start]
                    piece = next(shard)
                    gradient = gradient.to(piece.tensor.device, piece.tensor.dtype).view(piece.tensor.shape)
                    piece.tensor.grad = None if member.index in unused else gradient
        if scales:
            self.optimizer.grad_scale = torch.tensor(1.0 / clip, device=self._device)  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            if scales:
                del self.optimizer.grad_scale  # type: ignore[attr-defined]
        for piece in self._shard:
            piece.tensor.grad = None

    def _pull(self) -> None:
        own = [chunks[self.group.rank] for chunks in self._chunks]
        mirrored = [(mirror, part) for mirror, part in zip(self._mirrors, own, strict=True) if mirror is not None]
        for mirror, part in mirrored:
            mirror.to_host(part)
        for mirror, _ in mirrored:
            mirror.wait()
        self._gather()
        # These copies are over before an owner writes again: every rank's next gradients follow them on one stream.
        for mirror, _ in mirrored:
            mirror.to_device()

    def _gather(self) -> None:
        if self.in_window:
            self.group.barrier()
            return
        pulls = [
            gather_chunks_async(flat, chunks, f"parameters of bucket {index}", self.options.algorithm, group=self.group)
            for index, (flat, chunks) in enumerate(zip(self._flat_parameters, self._chunks, strict=True))
        ]
        for pull in pulls:
            pull.wait()

    def update_parameters(self, change: Callable[[torch.nn.Module], object]) -> None:
        self.group.barrier()
        alone = self.in_window and not any(self._mirrors)
        if not alone or self.group.rank == 0:
            super().update_parameters(change)
        self.group.barrier()
        if alone:
            self._follow_parameters()
            # What is not trained, and buffers, every rank has for itself.
            shared = {item.name for item in self.parameters}
            give_from_rank_0(self.group, [entry for entry in tensors_of(self.model) if entry[0] not in shared])

    def close(self) -> None:
        """Also gives every rank parameters of its own again."""
        for item in self.parameters:
            item.tensor.data = item.tensor.data.clone()
        super().close()
        if self.in_window and self.group.rank == 0:
            assert self.group.window is not None
            for flat in self._flat_parameters:
                self.group.window.free(flat)


class SingleServer(Colocated):
    name = "ps"
    sharded = False


class ShardedServer(Colocated):
    name = "dps"
    sharded = True
