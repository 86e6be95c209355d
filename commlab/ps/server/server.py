"""One server as a state machine: a message in, messages out. It neither waits nor knows of a transport.

    place(peer, header)            where the numbers of a message are to be written, before they have arrived
    receive(peer, header, data)    take the message in; answers go to ``outbox``

So the order in which messages come in is all there is to it: tests deliver them in any order, and the same order gives
the same bits.

BSP: rounds (:mod:`commlab.ps.server.rounds`); a part is updated as soon as its round is complete, or, where ``agrees``, all
parts of all servers together, once all workers have ended the clock and the servers have told each other their part of
the gradient's norm. SSP and ASP: every push is an update of its own, made when it arrives.
M. Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014.
"""

from __future__ import annotations

import json

import torch

from ...errors import UsageError
from ..encoding import decode, encode
from ..messages import Header, Kind
from .bsp import Lockstep
from .ledger import Waiting
from .rounds import Hypers


class Server(Lockstep):
    """Server ``index`` of a store. Peers 0 .. W - 1 are the workers in rank order, W .. W + K - 1 the servers.

    ``names`` says in messages who the workers are. ``log``: where given, every update is appended to it.
    """

    # Messages in.

    def place(self, peer: int, header: Header) -> torch.Tensor | None:
        """Memory (bytes) for what follows ``header``, or None while it can't be taken in: ask again after the next
        :meth:`receive`."""
        if self.rounds is not None and header.kind == Kind.PUSH:
            state = self.workers[peer]
            state.refused = self._against_push(peer, header)
            if not state.refused:
                if self.rounds.is_ahead(header):
                    return None
                run = self.shard.run(header.key, header.parts)
                assert run is not None and header.dtype is not None
                return self.rounds.slot(peer, header.dtype, *run).view(torch.uint8)
        if header.length > self._scratch.get(peer, torch.empty(0)).numel():
            self._scratch[peer] = torch.empty(header.length, dtype=torch.uint8)
        return self._scratch[peer][: header.length] if header.length else torch.empty(0, dtype=torch.uint8)

    def receive(self, peer: int, header: Header, data: torch.Tensor) -> None:
        """Take in a message whose bytes lie in ``data``, where :meth:`place` put them."""
        if header.kind == Kind.VERDICT:
            self._verdicts.setdefault(header.clock, {})[peer - self.rules.workers] = (header.value, header.flag)
            self._agree()
            return
        state = self.workers[peer]
        if header.kind in (Kind.PUSH, Kind.INIT):
            self._take_numbers(peer, header, data)
        elif header.kind == Kind.PULL:
            self._pull(peer, header)
        elif header.kind == Kind.CLOCK:
            self._end_clock(peer, header)
        elif header.kind == Kind.HYPER:
            state.hypers = _hypers(data)
            self._answer(peer, header)
        elif header.kind == Kind.TICKET:
            self._answer(peer, header._replace(clock=self._tickets))
            self._tickets += 1
        elif header.kind == Kind.REPORT:
            self._answer_text(peer, header, Kind.TEXT, json.dumps(self.report()))
        elif header.kind in (Kind.GET_STATE, Kind.SET_STATE):
            self._move_state(peer, header, data)
        elif header.kind in (Kind.LEAVE, Kind.CLOSE):
            self._leave(peer)
            state.closed = header.kind == Kind.CLOSE
            self._answer(peer, header)
        else:
            self._answer_text(peer, header, Kind.ERROR, f"{header.kind.name} is not a request")

    # Pushes.

    def _take_numbers(self, peer: int, header: Header, data: torch.Tensor) -> None:
        state = self.workers[peer]
        refused, state.refused = state.refused, ""
        refused = refused or (self._against_push(peer, header) if header.kind == Kind.PUSH else self._against(header))
        if refused:
            self._answer_text(peer, header, Kind.ERROR, refused)
            return
        assert header.dtype is not None
        run = range(header.key, header.key + header.parts)
        if header.kind == Kind.INIT:
            found = self.shard.run(header.key, header.parts)
            assert found is not None
            dtype, place = found
            self.shard.values[dtype][place.start : place.stop].copy_(data.view(header.dtype))
            for part in run:
                self.versions[part] += 1
        elif self.rounds is not None:
            self.rounds.take(peer, header, state.hypers)
            self._add(run)
        else:
            self._update_at_once(peer, header, data.view(header.dtype))
        self._answer(peer, header)

    def _update_at_once(self, peer: int, header: Header, numbers: torch.Tensor) -> None:
        hypers = self.workers[peer].hypers
        gradients, at = {}, 0
        for part in range(header.key, header.key + header.parts):
            numel = self.shard.parts[part].numel
            gradients[part] = self._gradient(part, numbers[at : at + numel], 1 / hypers.scale)
            at += numel
        self._update(gradients, ((peer, header.clock, header.sequence),), hypers, 1 / hypers.scale)

    # The optimizer's state.

    def _move_state(self, peer: int, header: Header, data: torch.Tensor) -> None:
        refused = "" if header.key < len(self.shard.parts) else self._against(header)
        if not refused:
            try:
                if header.kind == Kind.GET_STATE:
                    found = encode(self.shard.state(header.key))
                    self.outbox.append((peer, header.answer(Kind.STATE, found.numel()), found))
                else:
                    self.shard.set_state(header.key, decode(data))
                    self._answer(peer, header)
                return
            except UsageError as error:
                refused = str(error)
        self._answer_text(peer, header, Kind.ERROR, refused)

    # Clocks.

    def _end_clock(self, peer: int, header: Header) -> None:
        state = self.workers[peer]
        if state.left or header.clock != state.clock:
            why = "has left" if state.left else f"is at clock {state.clock}"
            self._answer_text(peer, header, Kind.ERROR, f"{self.names[peer]} can't end clock {header.clock}: it {why}")
            return
        state.clock += 1
        if self.rules.agrees:
            self._finite[header.clock] = self._finite.get(header.clock, True) and header.flag
            self._clocks.append(Waiting(peer, header, self.now_s))
        else:
            self._answer(peer, header)
        if self.rounds is not None:
            self._add(range(len(self.shard.parts)))
            self._agree()
            self._refuse_hopeless()
        else:
            self._wake(-1)

    def _leave(self, peer: int) -> None:
        self.workers[peer].left = True
        if self.rounds is None:
            self._wake(-1)
        else:
            self._refuse_hopeless()

    # Reads.

    def _pull(self, peer: int, header: Header) -> None:
        refused = self._against(header, sized=False)
        if not refused and not all(self.versions[header.key : header.key + header.parts]):
            refused = f"{self.shard.names[header.key]!r} was pulled by {self.names[peer]} before it had a first value"
        if refused:
            self._answer_text(peer, header, Kind.ERROR, refused)
            return
        self._read(Waiting(peer, header, self.now_s))
        if self.rounds is not None:
            self._refuse_hopeless()

    # Those who have waited too long.

    def overdue(self, limit_s: float) -> list[tuple[Waiting, str]]:
        """Requests that have waited for ``limit_s``, and for whom."""
        found = []
        for waiting in (*self._clocks, *(waiting for reads in self._reads.values() for waiting in reads)):
            if self.now_s - waiting.since_s >= limit_s:
                slowest = min(state.clock for state in self.workers if not state.left)
                slow = [peer for peer, state in enumerate(self.workers) if state.clock == slowest and not state.left]
                who = ", ".join(self.names[peer] for peer in slow)
                found.append((waiting, f"{who} (at clock {slowest})"))
        return found

    def give_up(self, limit_s: float) -> None:
        """Answer what has waited for ``limit_s`` with an error that names the slow."""
        for waiting, who in self.overdue(limit_s):
            for reads in (self._clocks, *self._reads.values()):
                if waiting in reads:
                    reads.remove(waiting)
            text = (
                f"{self.names[waiting.worker]} has waited {self.now_s - waiting.since_s:.1f} s at clock "
                f"{waiting.header.clock} for {who}; it may be stuck or slow: see its own output, or raise the timeout"
            )
            self._answer_text(waiting.worker, waiting.header, Kind.ERROR, text)


def _hypers(data: torch.Tensor) -> Hypers:
    said = json.loads(bytes(data.numpy()))
    groups = said["groups"]
    if groups is not None:
        groups = [{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()} for entry in groups]
    return Hypers(groups, said["scale"])
