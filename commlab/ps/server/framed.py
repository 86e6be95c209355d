"""Frames on a server: each entry is taken in, or refused, as if it had come alone, and adjoining entries together."""

from __future__ import annotations

import torch

from .. import frames
from ..frames import Entry
from ..messages import Header, Kind
from .ledger import Ledger
from .synchronization import Synchronization


class FrameIntake:
    """The frames of all workers."""

    def __init__(self, ledger: Ledger, synchronization: Synchronization):
        self._ledger, self._synchronization = ledger, synchronization
        self._arrived: dict[int, frames.Frame] = {}
        """By worker: the frame that has arrived and is not taken in yet."""

    def ready(self, worker: int, header: Header, data: torch.Tensor) -> bool:
        """Whether a frame that has arrived can be taken in: else ask again when the server has received more."""
        if worker not in self._arrived:
            self._arrived[worker] = frames.unpack(header, data, self._ledger.names[worker])
        entries = self._arrived[worker].entries
        return header.kind == Kind.PULL_FRAME or self._synchronization.ready(worker, header, entries)

    def take(self, worker: int, header: Header) -> None:
        """Take in a frame that is ready."""
        frame, ledger = self._arrived.pop(worker), self._ledger
        refused: dict[str, list[Entry]] = {}
        if header.kind == Kind.PULL_FRAME:
            self._pull(worker, header, frame.entries, refused)
        elif reason := self._push(worker, header, frame, refused):
            ledger.refuse(worker, header, reason)
            return
        for why, entries in refused.items():
            ledger.refuse_entries(worker, header, entries, why)
        if header.kind == Kind.PUSH_FRAME and sum(map(len, refused.values())) < len(frame.entries):
            ledger.acknowledge(worker, header)

    def _push(self, worker: int, header: Header, frame: frames.Frame, refused: dict[str, list[Entry]]) -> str:
        """Take in a frame of pushes; returns why all of it is refused."""
        shard, wire = self._ledger.shard, header.dtype
        groups = frames.joined(frame.entries)
        ranges = [shard.span(first := group[0][0], group[-1][0] + group[-1][1] - first) for group in groups]
        numel = sum(found[1].numel for found in ranges if found is not None)
        size = 0 if wire is None else numel * wire.itemsize
        if None in ranges or frame.body.numel() != size:
            return (
                f"a frame of {len(frame.entries)} parts, {numel} numbers of them on server {self._ledger.index}, came "
                f"with {frame.body.numel()} B"
            )
        numbers, start = None if wire is None else frame.body.view(wire), 0
        for group, found in zip(groups, ranges, strict=True):
            assert found is not None
            own = None if numbers is None else numbers[start : start + found[1].numel]
            start += found[1].numel
            if self._refusal(worker, header, group):
                # Of adjoining entries only those that are at fault.
                at = 0
                for entry in group:
                    [span] = shard.spans(range(entry[0], entry[0] + entry[1]))
                    few = None if own is None else own[at : at + span.where.numel]
                    at += span.where.numel
                    if reason := self._refusal(worker, header, [entry]):
                        refused.setdefault(reason, []).append(entry)
                    else:
                        self._synchronization.take_span(worker, header, span, few)
            else:
                [span] = shard.spans(range(group[0][0], group[-1][0] + group[-1][1]))
                self._synchronization.take_span(worker, header, span, own)
        self._synchronization.end_frame(worker, header)
        return ""

    def _refusal(self, worker: int, header: Header, group: list[Entry]) -> str:
        """Why entries that adjoin are refused, all or any of them."""
        first, stop = group[0][0], group[-1][0] + group[-1][1]
        asked = header._replace(key=first, slices=stop - first)
        if header.kind == Kind.PULL_FRAME:
            return self._ledger.against_pull(worker, asked._replace(kind=Kind.PULL))
        return self._synchronization.against(worker, asked._replace(kind=Kind.PUSH))

    def _pull(self, worker: int, header: Header, entries: list[Entry], refused: dict[str, list[Entry]]) -> None:
        good: list[Entry] = []
        for group in frames.joined(entries):
            if not self._refusal(worker, header, group):
                good += group
                continue
            for entry in group:
                if reason := self._refusal(worker, header, [entry]):
                    refused.setdefault(reason, []).append(entry)
                else:
                    good.append(entry)
        self._synchronization.read(worker, header, good)
