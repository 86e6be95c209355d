"""What is ready on all ranks is carried out, several operations of a kind together, on those of
:mod:`commlab.collectives`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from .. import trace
from . import moves, reductions
from .announced import Ready
from .announcement import size_bytes_of
from .channel import Channel
from .foreseen import Promise
from .parts import Part, parts_of
from .tick import Waits


def batches(channel: Channel, ready: Sequence[Ready]) -> list[list[Ready]]:
    """What is ready, in operations that are carried out together. The same on all ranks."""
    found: list[list[Ready]] = []
    open_batches: dict[Any, tuple[list[Ready], int]] = {}
    for each in ready:
        request = each.request
        key: Any = None
        if request.kind == "allreduce" and request.op != "adasum" and len(set(request.dtypes)) == 1:
            key = (request.kind, request.dtypes[0], request.op, request.scales)
        elif request.kind in ("allgather", "broadcast"):
            key = (request.kind, request.root)
        size_bytes = _size_bytes(each)
        batch, gathered = open_batches.get(key, ([], 0))
        if key is None or not batch or gathered + size_bytes > channel.settings.fusion_bytes:
            batch, gathered = [], 0
            found.append(batch)
        batch.append(each)
        open_batches[key] = batch, gathered + size_bytes
    return found


def _size_bytes(each: Ready) -> int:
    """As all ranks count it."""
    if each.request.kind != "allgather":
        return size_bytes_of(each.request.dtypes, each.request.shapes)
    return sum(size_bytes_of(request.dtypes, request.shapes) for request in each.requests.values())


def run(channel: Channel, batch: Sequence[Ready], promise: Promise | None = None) -> Waits:
    """Carry out one batch. Collective over the channel's ranks. ``promise``: that of a batch which the others were not
    asked about; DisagreementError where they have not foreseen it too."""
    started_ns = time.perf_counter_ns()
    kind = batch[0].request.kind
    for each in batch:
        if each.submission is not None:
            each.submission.await_device()
    with torch.no_grad():
        if kind == "allreduce" and batch[0].request.op == "adasum":
            yield from reductions.combine(channel, batch[0])
        elif promise is not None and (tensors := reductions.plain_tensors(promise)):
            yield from reductions.allreduce_in_place(channel, promise, tensors)
        elif kind == "allreduce":
            for part in _of_one_dtype(batch):
                yield from reductions.allreduce(channel, part, promise)
        elif kind == "allgather":
            yield from moves.allgather(channel, batch)
        elif kind == "broadcast":
            yield from moves.broadcast(channel, batch)
        elif kind == "alltoall":
            yield from moves.alltoall(channel, batch[0])
        elif kind == "reducescatter":
            yield from reductions.reducescatter(channel, batch[0])
    if trace.enabled():
        stopped_ns = time.perf_counter_ns()
        for each in batch:
            if each.submission is not None:
                lane = each.request.name
                trace.record(f"NEGOTIATE_{kind.upper()}", lane, each.submission.started_ns or started_ns, started_ns)
                trace.record(kind.upper(), lane, started_ns, stopped_ns, tensors=len(batch))


def _of_one_dtype(batch: Sequence[Ready]) -> list[tuple[Ready, list[Part]]]:
    """The batch's tensors by dtype; a grouped operation may have several."""
    found: dict[torch.dtype, list[Part]] = {}
    for part in parts_of(batch):
        found.setdefault(part.dtype, []).append(part)
    return [(batch[0], parts) for parts in found.values()]
