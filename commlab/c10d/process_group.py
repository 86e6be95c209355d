"""The process group: every method of torch.distributed's that takes tensors, by commlab's collectives where
:mod:`.reductions` and :mod:`.moves` have one, else by gloo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..native.versions import count_write
from ..runtime.agreement import Signature
from . import moves, reductions
from .arguments import awaited, listed, op_text, present, rows_of, with_op, with_root
from .membership import Membership
from .monitor import monitored_barrier
from .tensors import flat_of, movable, write, write_all
from .work import CommlabWork


class CommlabProcessGroup(Membership):
    """What torch.distributed calls a process group: one object, whose methods C++ calls too. Made as
    :class:`.membership.Membership` says."""

    # --- Reductions

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> Any:
        tensors, opts = listed(tensors), with_op(opts, dist.AllreduceOptions)
        work = reductions.allreduce(self, tensors, opts.reduceOp, awaited(opts))
        return work or self._left_reduction("allreduce", tensors, opts, lambda gloo, flats: gloo.allreduce(flats, opts))

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        opts = opts or dist.AllreduceCoalescedOptions()
        work = reductions.allreduce_coalesced(self, tensors, opts.reduceOp)
        return work or self._left_reduction(
            "allreduce", tensors, opts, lambda gloo, flats: gloo.allreduce_coalesced(flats, opts)
        )

    def reduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: Any = None) -> Any:
        tensors, opts = listed(tensors), with_root(opts, dist.ReduceOptions, op)
        work = reductions.reduce(self, tensors, opts.rootRank, opts.reduceOp, awaited(opts))
        return work or self._left_reduction(
            "reduce", tensors, opts, lambda gloo, flats: gloo.reduce(flats, opts), opts.rootRank
        )

    def reduce_scatter(self, outs: Any, ins: Any, opts: Any = None, timeout: Any = None) -> Any:
        outs, opts = listed(outs), with_op(opts, dist.ReduceScatterOptions)
        ins = ins if isinstance(ins[0], (list, tuple)) else [ins]
        work = (
            reductions.reduce_scatter(self, outs[0], ins[0], opts.reduceOp, awaited(opts)) if len(outs) == 1 else None
        )
        return work or self._left_reduce_scatter(outs, ins, opts)

    def reduce_scatter_single(self, out: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Any:
        opts = with_op(opts, dist.ReduceScatterOptions)
        work = reductions.reduce_scatter(self, out, [tensor], opts.reduceOp, awaited(opts))
        return work or self._left_reduce_scatter([out], [[tensor]], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outs: Any, ins: Any, opts: Any = None) -> Any:
        return self._all(
            [self.reduce_scatter_single(out, each, opts) for out, each in zip(outs, ins, strict=True)], outs
        )

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # --- Moves

    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None) -> Any:
        tensors, opts = listed(tensors), with_root(opts, dist.BroadcastOptions)
        root, written = opts.rootRank, tensors if self.rank() != opts.rootRank else []
        work = moves.broadcast(self, tensors, root, awaited(opts))
        return work or self._left(
            "broadcast", tensors, written, lambda gloo: gloo.broadcast(tensors, opts), f"root {root}"
        )

    def allgather(self, outs: Any, ins: Any, opts: Any = None) -> Any:
        outs, ins = outs if isinstance(outs[0], (list, tuple)) else [outs], listed(ins)
        work = moves.allgather(self, outs[0], ins[0], awaited(opts)) if len(ins) == 1 else None
        return work or self._left("allgather", ins, outs, lambda gloo: gloo.allgather(outs, ins, *present(opts)))

    def all_gather_single(self, out: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Any:
        work = moves.allgather_single(self, out, tensor, awaited(opts))
        return work or self._left(
            "allgather", [tensor], [out], lambda gloo: gloo._allgather_base(out, tensor, *present(opts))
        )

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outs: Any, ins: Any, opts: Any = None) -> Any:
        return self._all([self.all_gather_single(out, each, opts) for out, each in zip(outs, ins, strict=True)], outs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather_coalesced(self, outs: Any, ins: Any, opts: Any = None) -> Any:
        """``outs[r][k]`` gets tensor k of rank r."""
        work = moves.allgather_coalesced(self, outs, listed(ins), awaited(opts))
        return work or self._left(
            "allgather", ins, outs, lambda gloo: gloo.allgather_coalesced(outs, ins, *present(opts))
        )

    def gather(self, outs: Any, ins: Any, opts: Any = None, timeout: Any = None) -> Any:
        ins, opts = listed(ins), with_root(opts, dist.GatherOptions)
        outs = outs if not outs or isinstance(outs[0], (list, tuple)) else [outs]
        root, room = opts.rootRank, [ins[0].new_empty(0)] * self.size()
        nothing, detail = list(room), f"{ins[0].dtype}, to root {root}"
        nothing[root] = ins[0]
        lists = self._of_each("gather", outs[0]) if self.rank() == root else room
        work = moves.exchange(self, "gather", detail, lists, nothing, outs, awaited(opts))
        return work or self._left("gather", ins, outs, lambda gloo: gloo.gather(outs, ins, opts), f"root {root}")

    def scatter(self, outs: Any, ins: Any, opts: Any = None, timeout: Any = None) -> Any:
        outs, opts = listed(outs), with_root(opts, dist.ScatterOptions)
        ins = ins if not ins or isinstance(ins[0], (list, tuple)) else [ins]
        root, nothing = opts.rootRank, [outs[0].new_empty(0)] * self.size()
        room, detail = list(nothing), f"{outs[0].dtype}, from root {root}"
        room[root] = outs[0]
        parts = self._of_each("scatter", ins[0]) if self.rank() == root else nothing
        work = moves.exchange(self, "scatter", detail, room, parts, outs, awaited(opts))
        return work or self._left("scatter", outs, outs, lambda gloo: gloo.scatter(outs, ins, opts), f"root {root}")

    def alltoall(self, outs: Any, ins: Any, opts: Any = None, timeout: Any = None) -> Any:
        outs, ins = self._of_each("alltoall", outs), self._of_each("alltoall", ins)
        work = moves.exchange(self, "alltoall", str(ins[0].dtype), outs, ins, outs, awaited(opts))
        return work or self._left("alltoall", ins, outs, lambda gloo: gloo.alltoall(outs, ins, *present(opts)))

    def all_to_all_single(
        self, out: torch.Tensor, tensor: torch.Tensor, out_splits: Any, in_splits: Any, opts: Any = None
    ) -> Any:
        if movable(out) and movable(tensor) and out.is_contiguous():
            even = not out_splits and not in_splits
            if even and awaited(opts) and (work := moves.alltoall_whole(self, out, tensor)):
                return work
            outs, parts = self._rows(out, out_splits), self._rows(tensor, in_splits)
            return moves.exchange(self, "alltoall", str(tensor.dtype), outs, parts, [out], awaited(opts))
        return self._left(
            "alltoall",
            [tensor],
            [out],
            lambda gloo: gloo.alltoall_base(out, tensor, out_splits, in_splits, *present(opts)),
        )

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None, timeout: Any = None) -> Any:
        span = self.begin("barrier", [])
        if span is None and awaited(opts):
            self.group.barrier()
            return self.work((), [])
        return self.work((self.group.submit(Signature("barrier")),), [], span=span)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Return once every rank has called it; RuntimeError that names who has not within ``timeout``."""
        self._barriers += 1
        store = dist.PrefixStore(f"monitored/{self._barriers}", self._store)
        limit = self._timeout if timeout is None else timeout
        monitored_barrier(store, self.rank(), self.size(), limit, wait_all_ranks)

    # --- Point to point

    def send(self, tensors: Any, to: int, tag: int = 0) -> Any:
        return self._gloo().send(tensors, to, tag)

    def recv(self, tensors: Any, frm: int, tag: int = 0) -> Any:
        count_write(tensors)
        return self._gloo().recv(tensors, frm, tag)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Any:
        count_write(tensors)
        return self._gloo().recv_anysource(tensors, tag)

    def _start_coalescing(self, device: Any) -> None:
        """Nothing: what follows is started at once, in order."""

    def _end_coalescing(self, device: Any) -> Any:
        return self.work((), [])

    def _of_each(self, kind: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``tensors``, of which there has to be one per rank."""
        if len(tensors) != self.size():
            raise ValueError(f"rank {self.rank()}: {kind} of {len(tensors)} tensors among {self.size()} ranks")
        return list(tensors)

    def _left_reduction(
        self, kind: str, tensors: Any, opts: Any, start: Callable[[Any, Any], Any], root: int | None = None
    ) -> CommlabWork:
        """A reduction for gloo, of which ranks compare the sizes and the operator too. gloo takes a tensor's memory for
        its numbers in order, and would reduce others where it is not contiguous."""
        dense, written = all(map(movable, tensors)), tensors if root in (None, self.rank()) else []
        flats = [flat_of(tensor) for tensor in tensors] if dense else tensors
        return self._left(
            kind,
            tensors,
            written,
            lambda gloo: start(gloo, flats),
            op_text(opts.reduceOp) + ("" if root is None else f", root {root}"),
            shape=(sum(tensor.numel() for tensor in tensors),),
            reduction=opts.reduceOp,
            after=(lambda: write_all(written, flats[: len(written)])) if dense else None,
        )

    def _left_reduce_scatter(self, outs: Any, ins: Any, opts: Any) -> CommlabWork:
        """As gloo does it, by an allreduce of all parts. Not by its own reduce_scatter, whose works never say that they
        are complete."""
        if len(outs) != 1:
            raise ValueError(f"rank {self.rank()}: reduce_scatter of {len(outs)} tensors; a rank has one on the CPU")
        out, parts = outs[0], ins[0]
        whole = torch.cat([part.detach().reshape(-1) for part in parts])
        before = sum(part.numel() for part in parts[: self.rank()]) if len(parts) > 1 else self.rank() * out.numel()
        asked = with_op(opts.reduceOp, dist.AllreduceOptions)
        return self._left(
            "reduce_scatter",
            whole,
            outs,
            lambda gloo: gloo.allreduce([whole], asked),
            op_text(opts.reduceOp),
            shape=(whole.numel(),),
            reduction=opts.reduceOp,
            after=lambda: write(out, whole[before : before + out.numel()]),
        )

    def _rows(self, whole: torch.Tensor, splits: Sequence[int]) -> list[torch.Tensor]:
        return rows_of(self.rank(), self.size(), whole, splits)

    def _all(self, works: Sequence[Any], value: Any) -> CommlabWork:
        def after() -> None:
            for work in works:
                work.wait()

        handles = [handle for work in works for handle in getattr(work, "handles", ())]
        return self.work(handles, list(value), after)
