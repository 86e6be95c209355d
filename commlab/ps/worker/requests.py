"""What a worker asks of the servers: keys and flat tensors become messages, answers become handles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import torch

from ...native.versions import count_write
from ...runtime.handle import Handle
from ..consistency import BSP, Consistency
from ..encoding import encode
from ..hypers import is_fixed
from ..link import Order
from ..messages import SMALL_BYTES, WIRE_CODES, Header, Kind
from ..placement import Slice
from .calls import Item, PendingRequests
from .client import CLOSE, Client, Message
from .keys import Keys, Span
from .outgoing import Outgoing

_LAST = 2**62


class Reading(NamedTuple):
    """At which clock a pull reads, and how many clocks this worker must have ended before the servers can answer."""

    clock: int
    needs_clocks: int


class Requests:
    """``wire``: the dtype in which pushes travel; None: as they are. ``consistency`` decides what a pull after a push
    of the same clock reads. Not for several threads at once, but for the answers, which any thread that polls
    ``client`` may take in."""

    def __init__(
        self, client: Client, keys: Keys, wire: torch.dtype | None, consistency: Consistency = BSP, agrees: bool = False
    ):
        self.client, self.keys, self.wire = client, keys, wire
        self.versions: dict[str, int] = {}
        """By key: the version of the value that was last pulled."""
        self._consistency, self._agrees = consistency, agrees
        self._outgoing = Outgoing(client, wire)
        self._pushed: set[str] = set()
        """The keys that this worker has pushed in its clock."""
        self._sent_hypers, self._hypers_clock = b"", -1
        self._hyper_values: list[Any] = []
        """What the hyper-parameters that the servers know were made of; empty where any of it may change in place."""
        self._pulled = self._note_versions
        """Bound once: thousands of pulls under way are to give Python's garbage collector little to look at."""

    # Pushes.

    def push(self, keys: tuple[str, ...], flat: torch.Tensor, clock: int) -> Handle:
        """Push several tensors of one dtype that lie side by side in ``flat``."""
        call = PendingRequests(self.client, "push", keys, clock)
        spans, dtype = self.keys.spans_of(keys), flat.dtype
        self._pushed.update(keys)
        if flat.numel() * dtype.itemsize > SMALL_BYTES or not self._is_busy(spans):
            return self._send(Kind.PUSH, call, spans, flat, self.wire, clock)
        with self.client.lock:
            self.client.begin(call, len(spans))
            for server, first, slices, start, stop in spans:
                item = Item(first, slices, call, flat if len(spans) == 1 else flat[start:stop])
                self._outgoing.push(server, dtype, clock, item, (stop - start) * dtype.itemsize)
        return call

    def push_nothing(self, keys: tuple[str, ...], clock: int) -> Handle:
        """This worker has no gradient for ``keys`` in this clock: what the end of the clock would tell, now. Under ssp
        and asp nobody waits for one."""
        call = PendingRequests(self.client, "push without a gradient", keys, clock)
        spans = self.keys.spans_of(keys) if self._consistency.averages else []
        self._pushed.update(keys)
        with self.client.lock:
            self.client.begin(call, len(spans))
            for span in spans:
                self._outgoing.push(span.server, None, clock, Item(span.first, span.slices, call, None), 0)
        return call

    def assign(self, keys: tuple[str, ...], flat: torch.Tensor) -> Handle:
        """Overwrite several tensors of one dtype that lie side by side in ``flat``."""
        call = PendingRequests(self.client, "first value", keys, -1)
        return self._send(Kind.INIT, call, self.keys.spans_of(keys), flat, None, -1)

    def _is_busy(self, spans: list[Span]) -> bool:
        """Whether a server of ``spans`` has pushes or pulls of this worker to answer, or a frame is being filled."""
        if self.client.filling:
            return True
        busy = self.client.busy
        return busy[spans[0].server] > 0 if len(spans) == 1 else any(busy[span.server] for span in spans)

    def _send(
        self,
        kind: Kind,
        call: PendingRequests,
        spans: list[Span],
        flat: torch.Tensor,
        wire: torch.dtype | None,
        clock: int,
    ) -> Handle:
        flat = flat.reshape(-1).to(device="cpu", dtype=wire or flat.dtype).resolve_neg().contiguous()
        data, itemsize, code = flat.view(torch.uint8), flat.element_size(), WIRE_CODES[flat.dtype]
        messages = [
            Message(
                span.server,
                (clock, 0, span.first),
                Header(kind, span.first, span.slices, clock=max(0, clock), wire=code),
                data[span.start * itemsize : span.stop * itemsize],
            )
            for span in spans
        ]
        handle = self.client.submit(call, messages)
        self.client.poll()
        return handle

    # Pulls.

    def pull_into(self, key: str, out: torch.Tensor, clock: int, follows: Handle | None = None) -> Handle:
        """Pull the value of one key into ``out``, wherever and however ``out`` lies. ``follows``: this clock's push of
        the same key, which this pull follows slice by slice, so that values come back while the rest is still being
        pushed."""
        target = out.detach() if out.requires_grad else out
        if target.is_contiguous() and target.is_cpu and not target.is_neg():
            flat = target if target.dim() == 1 else target.view(-1)
            # Written behind torch's back; whoever has saved the old numbers for backward must hear of it.
            return self._pull((key,), flat, clock, self.wire, out, partial(count_write, (out,)), follows)
        flat = torch.empty(target.numel(), dtype=target.dtype, device="cpu")

        def use() -> None:
            with torch.inference_mode():  # in which every tensor may be written, those made in it too
                target.copy_(flat.view(target.shape))

        return self._pull((key,), flat, clock, self.wire, out, use, follows)

    def pull_flat(self, keys: tuple[str, ...], flat: torch.Tensor, clock: int, wire: torch.dtype | None) -> Handle:
        """Pull values side by side into ``flat`` (1-D, contiguous, CPU)."""
        return self._pull(keys, flat, clock, wire, flat, None, None)

    def _pull(
        self,
        keys: tuple[str, ...],
        flat: torch.Tensor,
        clock: int,
        wire: torch.dtype | None,
        result: torch.Tensor,
        use: Callable[[], None] | None,
        follows: Handle | None,
    ) -> Handle:
        """``use()`` is called when the values lie in ``flat``."""
        reading = self._reading(keys[0], clock, follows is not None) if keys else Reading(clock, 0)
        asked: list[tuple[Span, int]] | None = None
        if len(keys) > 1 and any(self._reading(key, clock, follows is not None) != reading for key in keys):
            asked, reading = self._key_by_key(keys, clock, follows is not None)
        spans = self.keys.spans_of(keys)
        itemsize = flat.dtype.itemsize
        small = flat.numel() * itemsize <= SMALL_BYTES and wire is self.wire and self._is_busy(spans)
        landing = flat
        complete: Callable[[PendingRequests], None] = self._pulled
        if not small and wire not in (None, flat.dtype):
            landing = torch.empty(flat.numel(), dtype=wire, device="cpu")
        if landing is not flat or (use is not None and not (small and flat.data_ptr() == result.data_ptr())):
            complete = partial(self._finish_pull, flat, landing, use)
        call = PendingRequests(
            self.client, "pull", keys, reading.clock, result, complete, follows, reading.needs_clocks
        )
        if small:
            # Under ssp and asp a value must have this worker's own pushes.
            late = not self._consistency.averages and not self._pushed.isdisjoint(keys)
            with self.client.lock:
                if asked is None and len(spans) == 1:
                    server, first, slices, start, stop = spans[0]
                    self.client.begin(call, 1)
                    item = Item(first, slices, call, flat)
                    self._outgoing.pull(server, flat.dtype, reading.clock, item, (stop - start) * itemsize, late)
                    return call
                asked = asked or [(span, reading.clock) for span in spans]
                self.client.begin(call, len(asked))
                for (server, first, slices, start, stop), read_at in asked:
                    item = Item(first, slices, call, flat[start:stop])
                    self._outgoing.pull(server, flat.dtype, read_at, item, (stop - start) * itemsize, late)
            return call
        data, itemsize, code = landing.view(torch.uint8), landing.element_size(), WIRE_CODES[landing.dtype]
        messages = [
            Message(
                span.server,
                (clock, 0, span.first),
                Header(Kind.PULL, span.first, span.slices, clock=read_at, wire=code),
                target=data[span.start * itemsize : span.stop * itemsize],
            )
            for span, read_at in asked or [(span, reading.clock) for span in spans]
        ]
        handle = self.client.submit(call, messages)
        self.client.poll()
        return handle

    def _note_versions(self, call: PendingRequests) -> None:
        for key in call.keys:
            self.versions[key] = call.version

    def _finish_pull(
        self, flat: torch.Tensor, landing: torch.Tensor, use: Callable[[], None] | None, call: PendingRequests
    ) -> None:
        if landing is not flat:
            flat.copy_(landing)
        if use is not None:
            use()
        self._note_versions(call)

    def _reading(self, key: str, clock: int, after: bool) -> Reading:
        """What a pull of ``key`` reads; ``after``: the value after this clock. Under bsp a worker that has pushed a key
        reads the value with this clock's update, whoever was faster: the value before it may be there no more."""
        pushed, consistency = key in self._pushed, self._consistency
        if consistency.averages:
            read_at = clock + (after or pushed)
            return Reading(read_at, 0 if pushed and not self._agrees else read_at)
        read_at = clock + after
        return Reading(read_at, 0 if consistency.staleness is None else read_at - consistency.staleness)

    def _key_by_key(self, keys: tuple[str, ...], clock: int, after: bool) -> tuple[list[tuple[Span, int]], Reading]:
        """Some of ``keys`` were pushed in this clock, some were not: the spans of each, with the clock at which they
        are read, and the latest."""
        asked, latest, base = [], Reading(clock, 0), 0
        for key in keys:
            reading = self._reading(key, clock, after)
            latest = Reading(max(latest.clock, reading.clock), max(latest.needs_clocks, reading.needs_clocks))
            for span in self.keys.spans_of((key,)):
                moved = span._replace(start=base + span.start, stop=base + span.stop)
                asked.append((moved, reading.clock))
            base += self.keys.entry(key).numel
        return asked, latest

    # The other requests.

    def end_clock(self, clock: int, finite: bool, complete: Callable[[PendingRequests], None] | None) -> Handle:
        """This worker has pushed all of ``clock``."""
        header = Header(Kind.CLOCK, clock=clock, flag=finite)
        handle = self.ask_all(header, (clock, 1, 0), f"end of clock {clock}", complete=complete)
        self._pushed.clear()
        self.client.at_clock(clock + 1)
        self.client.poll()
        return handle

    def send_hypers(self, clock: int, values: Callable[[], list[Any]], text: Callable[[], bytes]) -> None:
        """Before the first push of a clock: send the servers the clock's hyper-parameters, if these differ from those
        that the servers know. ``text()``: :func:`commlab.ps.hypers.encode`; ``values()``: all that ``text()`` is made
        of. Cost where these are the same objects as at the last clock, and numbers or text: a look at each."""
        if self._hypers_clock == clock:
            return
        now = values()
        if len(now) == len(self._hyper_values) and all(map(is_, now, self._hyper_values)):
            self._hypers_clock = clock
            return
        sent = text()
        self._hypers_clock, self._hyper_values = clock, now if all(map(is_fixed, now)) else []
        if sent != self._sent_hypers:
            self._sent_hypers = sent
            data = torch.frombuffer(bytearray(sent), dtype=torch.uint8)
            self.ask_all(Header(Kind.HYPER, clock=clock), (clock, -1, 0), f"hyper-parameters of clock {clock}", data)

    def close(self, clock: int) -> Handle:
        """Tell the servers that live that this worker sends nothing more."""
        servers = [server for server in range(len(self.client.links)) if server not in self.client.failed]
        messages = [Message(server, (_LAST, 0, 0), Header(Kind.CLOSE, clock=clock)) for server in servers]
        return self.client.submit(PendingRequests(self.client, CLOSE, clock=clock), messages)

    def move_state(self, owned: Slice, state: dict[str, Any] | None, clock: int) -> Handle:
        """Set what the optimizer remembers of a slice; None: ask for the state."""
        what = f"state of {self.keys.placement.entries[owned.entry].name!r}[{owned.start}:{owned.stop}]"
        header = Header(Kind.GET_STATE if state is None else Kind.SET_STATE, owned.number, 1, clock=clock)
        return self.ask(owned.server, header, (clock, 2, owned.number), what, None if state is None else encode(state))

    def ask_all(
        self,
        header: Header,
        order: Order,
        what: str,
        data: torch.Tensor | None = None,
        complete: Callable[[PendingRequests], None] | None = None,
    ) -> Handle:
        """The same request to every server; ``complete`` is that of :class:`PendingRequests`."""
        servers = range(len(self.keys.placement.of_server))
        messages = [Message(server, order, header, data) for server in servers]
        call = PendingRequests(self.client, what, clock=header.clock, complete=complete)
        return self.client.submit(call, messages)

    def ask(
        self,
        server: int,
        header: Header,
        order: Order,
        what: str,
        data: torch.Tensor | None = None,
        complete: Callable[[PendingRequests], None] | None = None,
    ) -> Handle:
        """A request to one server; ``complete`` is that of :class:`PendingRequests`."""
        call = PendingRequests(self.client, what, clock=header.clock, complete=complete)
        return self.client.submit(call, [Message(server, order, header, data)])
