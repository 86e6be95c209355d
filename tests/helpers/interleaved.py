"""Workers and servers of a parameter server in one process: every message delivered when a seeded coin says so.

The servers are the real state machines; the workers are scripts. Messages of one worker to one server stay in order, as
on a real network, and everything else is up to the coin: the same seed gives the same run.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from commlab.ps import frames
from commlab.ps.consistency import parse
from commlab.ps.messages import NO_WIRE, WIRE_CODES, Header, Kind
from commlab.ps.placement import Entry, Slice, deal
from commlab.ps.server.ledger import Record, Rules
from commlab.ps.server.server import Server
from commlab.ps.server.shard import Shard

ENTRIES = (
    Entry("wide", (40, 31), torch.float32),
    Entry("bias", (7,), torch.float32),
    Entry("none", (), torch.float32),
    Entry("half", (50,), torch.bfloat16, 1),
    Entry("last", (33,), torch.float32, 1),
)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def adam(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=0.01)


def gradient(worker: int, clock: int, entry: int, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that tell everything apart, not exact in any dtype."""
    at = torch.arange(start, stop, dtype=torch.float64)
    return torch.sin(at * 0.7 + 11 * worker + 3.3 * clock + 101 * entry).to(dtype)


@dataclass
class Story:
    """What the workers do, drawn from the seed."""

    seed: int
    consistency: str
    workers: int = 3
    servers: int = 2
    clocks: int = 4
    wire: torch.dtype | None = None
    max_grad_norm: float | None = None
    leavers: dict[int, int] = field(default_factory=dict)
    """Worker to the clock after which it leaves."""
    factory: Any = sgd
    slow: int | None = None
    """A worker that the coin seldom lets go on."""
    skipping: bool = False
    """Whether workers leave out some tensors in some clocks."""
    after: bool = False
    """Whether workers pull again after their pushes, what the next clock begins with (BSP)."""
    framed: bool = False
    """Whether messages carry several entries, of any slices of one dtype."""


class Run:
    """One story, told to its end by :meth:`run`."""

    def __init__(self, story: Story, server_type: type[Server] = Server):
        self.story, self.coin = story, random.Random(story.seed)
        self.placement = deal(ENTRIES, story.servers)
        rules = Rules(
            parse(story.consistency),
            story.workers,
            story.servers,
            agrees=story.max_grad_norm is not None,
            max_grad_norm=story.max_grad_norm,
        )
        self.logs: list[list[Record]] = [[] for _ in range(story.servers)]
        self.servers = [
            server_type(Shard(self.placement, index, story.factory, 2), rules, index, log=self.logs[index])
            for index in range(story.servers)
        ]
        self.boxes: dict[tuple[int, int], deque[tuple[Header, torch.Tensor]]] = {}
        self.pushed: dict[tuple[int, int, int, int], int] = {}
        """(server, worker, sequence, slice) to the clock."""
        self.plan: dict[tuple[int, int], list[int]] = {}
        """(worker, clock) to the tensors that it pushes."""
        self.answers: dict[tuple[int, int], tuple[Header, torch.Tensor | None]] = {}
        self.reads: list[tuple[int, int, int, int, float]] = []
        """(server, worker, clock, slice, staleness) of every read, in the order of the answers."""
        self._sequence = 0
        self._asked: dict[int, tuple[int, int, int, set[int]]] = {}
        """Sequence to (server, worker, clock, slices that are not answered)."""
        for server in self.servers:
            for owned in server.ledger.shard.slices:
                first = self.first_value(owned)
                header = Header(Kind.INIT, owned.number, 1, wire=WIRE_CODES[first.dtype])
                self._deliver(
                    0, server.ledger.index, header._replace(length=first.numel() * first.element_size()), first
                )
            server.ledger.outbox.clear()

    def first_value(self, owned: Slice) -> torch.Tensor:
        return gradient(99, 0, owned.entry, owned.start, owned.stop, ENTRIES[owned.entry].dtype)

    def _deliver(self, peer: int, server: int, header: Header, data: torch.Tensor) -> bool:
        target = self.servers[server].memory_for(peer, header)
        if target is None:
            return False
        target.copy_(data.view(-1).view(torch.uint8))
        if not self.servers[server].ready(peer, header, target):
            return False
        self.servers[server].receive(peer, header, target)
        return True

    def send(self, worker: int, server: int, header: Header, data: torch.Tensor | None = None) -> int:
        self._sequence += 1
        data = torch.empty(0, dtype=torch.uint8) if data is None else data.view(-1).view(torch.uint8)
        header = header._replace(sequence=self._sequence, length=data.numel())
        self.boxes.setdefault((worker, server), deque()).append((header, data))
        return self._sequence

    def _messages(self, slices: list[Slice]) -> list[list[Slice]]:
        """The slices that travel together: each alone, or several of one server and dtype in a frame."""
        if not self.story.framed:
            return [[owned] for owned in slices]
        groups: dict[tuple[int, torch.dtype], list[Slice]] = {}
        for owned in slices:
            groups.setdefault((owned.server, ENTRIES[owned.entry].dtype), []).append(owned)
        messages = []
        for group in groups.values():
            while group:
                count = self.coin.randint(1, len(group))
                messages.append(sorted(group[:count], key=lambda owned: owned.number))
                del group[:count]
        return messages

    def send_many(
        self, me: int, kind: Kind, together: list[Slice], clock: int, wire: int, numbers: list[torch.Tensor]
    ) -> int:
        server = together[0].server
        if not self.story.framed:
            header = Header(kind, together[0].number, 1, clock=clock, wire=wire)
            return self.send(me, server, header, numbers[0] if numbers else None)
        framed = Kind.PUSH_FRAME if kind == Kind.PUSH else Kind.PULL_FRAME
        body = torch.cat(numbers) if numbers else torch.empty(0, dtype=torch.uint8)
        data = frames.pack([(owned.number, 1) for owned in together], body)
        return self.send(me, server, Header(framed, len(together), clock=clock, wire=wire), data)

    def worker(self, me: int) -> Iterator[list[int]]:
        """The script of one worker; it yields the requests whose answers it waits for."""
        story = self.story
        everywhere = range(story.servers)
        for clock in range(story.clocks):
            hyper = {"groups": [{"lr": 0.1 / (1 + clock)}, {"lr": 0.05}], "scale": 1.0}
            text = torch.frombuffer(bytearray(json.dumps(hyper).encode()), dtype=torch.uint8)
            for server in everywhere:
                self.send(me, server, Header(Kind.HYPER), text)
            reads = []
            everything = [owned for slices in self.placement.of_entry for owned in slices]
            self.coin.shuffle(everything)
            for together in self._messages(everything):
                wire = WIRE_CODES[ENTRIES[together[0].entry].dtype]
                reads.append(self.send_many(me, Kind.PULL, together, clock, wire, []))
                self._asked[reads[-1]] = (together[0].server, me, clock, {owned.number for owned in together})
            yield reads
            wanted = self.plan[me, clock] = [
                at for at in range(len(ENTRIES)) if not story.skipping or self.coin.random() < 0.7
            ]
            writes = []
            for together in self._messages([owned for owned in everything if owned.entry in wanted]):
                dtype = story.wire or ENTRIES[together[0].entry].dtype
                numbers = [gradient(me, clock, each.entry, each.start, each.stop, dtype) for each in together]
                writes.append(self.send_many(me, Kind.PUSH, together, clock, WIRE_CODES[dtype], numbers))
                for owned in together:
                    self.pushed[owned.server, me, writes[-1], owned.number] = clock
            if story.framed and story.consistency == "bsp":
                # What the end of the clock would tell, now.
                for together in self._messages([owned for owned in everything if owned.entry not in wanted]):
                    if self.coin.random() < 0.5:
                        writes.append(self.send_many(me, Kind.PUSH, together, clock, NO_WIRE, []))
            if story.after:
                pushed = [owned for owned in everything if owned.entry in wanted]
                for together in self._messages(pushed):
                    wire = WIRE_CODES[ENTRIES[together[0].entry].dtype]
                    writes.append(self.send_many(me, Kind.PULL, together, clock + 1, wire, []))
                    self._asked[writes[-1]] = (together[0].server, me, clock + 1, {each.number for each in together})
            if self.coin.random() < 0.5:
                yield writes
            ends = [self.send(me, server, Header(Kind.CLOCK, clock=clock)) for server in everywhere]
            if self.coin.random() < 0.5:
                yield ends
            if story.leavers.get(me) == clock:
                break
        yield [self.send(me, server, Header(Kind.CLOSE)) for server in everywhere]

    def run(self) -> Run:
        scripts = {me: self.worker(me) for me in range(self.story.workers)}
        waits: dict[int, list[int]] = {me: [] for me in scripts}
        while scripts or any(self.boxes.values()):
            moves: list[tuple[int, int]] = [pair for pair, box in self.boxes.items() if box]
            ready = [me for me in scripts if all(sequence in self.answers for sequence in waits[me])]
            choices: list[Any] = [*moves, *ready]
            self.coin.shuffle(choices)
            if self.coin.random() < 0.97:
                choices.sort(key=lambda choice: choice == self.story.slow)
            for choice in choices:
                if isinstance(choice, tuple):
                    header, data = self.boxes[choice][0]
                    if not self._deliver(*choice, header, data):
                        continue
                    self.boxes[choice].popleft()
                    self._collect(choice[1])
                else:
                    try:
                        waits[choice] = next(scripts[choice])
                    except StopIteration:
                        del scripts[choice]
                break
            else:
                raise AssertionError(f"nobody can go on: {waits}")
        return self

    def _collect(self, server: int) -> None:
        ledger = self.servers[server].ledger
        outbox, ledger.outbox = ledger.outbox, []
        for peer, header, data in outbox:
            if peer >= self.story.workers:
                body = torch.empty(0, dtype=torch.uint8)
                self.boxes.setdefault((self.story.workers + server, peer - self.story.workers), deque()).append(
                    (header, body)
                )
                continue
            assert header.kind not in (Kind.ERROR, Kind.REFUSED_FRAME), bytes(data.numpy())  # type: ignore[union-attr]
            answered = True
            if header.kind in (Kind.VALUES, Kind.VALUES_FRAME):
                where, me, clock, open_ = self._asked[header.sequence]
                entries = [(header.key, 1)]
                if header.kind == Kind.VALUES_FRAME:
                    assert data is not None
                    entries, versions, body = frames.unpack(header, data, "server", versions=True)
                    shard = self.servers[server].ledger.shard
                    values = torch.cat([shard.pieces[index].view(-1) for index, _ in entries])
                    assert torch.equal(body.view(header.dtype), values), "as they are when the answer leaves"
                    assert versions == [shard.versions[index] for index, _ in entries]
                else:
                    versions = [header.clock]
                if self.story.consistency == "bsp" and not self.story.skipping:
                    assert set(versions) == {1 + clock}, "the updates of all clocks before, and no other"
                for index, _ in entries:
                    self.reads.append((where, me, clock, index, header.value))
                    self.check_read(where, me, clock, index)
                    open_.remove(index)
                answered = not open_
            if answered:
                self.answers[header.sequence] = header, data

    def check_read(self, server: int, me: int, clock: int, index: int) -> None:
        """What SSP promises, by what is in the value and not by any clock: the server's log has every push to this
        slice by the workers that are still there, of clocks <= clock - s - 1."""
        ledger = self.servers[server].ledger
        staleness = ledger.rules.consistency.staleness
        if staleness is None:
            return
        entry = ledger.shard.slices[index].entry
        made = {
            (worker, at) for record in self.logs[server] if index in record.slices for worker, at, _ in record.pushes
        }
        for worker in range(self.story.workers):
            for at in range(clock - staleness):
                gone = worker in self.story.leavers and at > self.story.leavers[worker]
                if not gone and entry in self.plan.get((worker, at), range(len(ENTRIES))):
                    assert (worker, at) in made, f"read by {me} at {clock} lacks {worker}'s push of {at}"
