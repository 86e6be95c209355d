"""What a worker asks of the servers: keys and flat tensors become messages, answers become handles."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...native.versions import count_write
from ...runtime.handle import Handle
from ..encoding import encode
from ..link import Order
from ..messages import MESSAGE_BYTES, WIRE_CODES, Header, Kind
from ..placement import Slice
from .client import Client, Message, PendingRequests
from .keys import Keys


class Span(NamedTuple):
    """Adjoining slices ``first .. first + slices - 1`` of a server, which travel in one message, and where their
    numbers lie in a flat tensor of this worker."""

    server: int
    first: int
    slices: int
    start: int
    stop: int


class Requests:
    """``wire``: the dtype in which pushes travel; None: as they are. Not for several threads at once, but for the
    answers, which any thread that polls ``client`` may take in."""

    def __init__(self, client: Client, keys: Keys, wire: torch.dtype | None):
        self.client, self.keys, self.wire = client, keys, wire
        self.versions: dict[str, int] = {}
        """By key: the version of the value that was last pulled."""
        self._spans: dict[tuple[str, ...], list[Span]] = {}
        self._sent_hypers, self._hypers_clock = b"", -1

    # Pushes.

    def push(self, keys: tuple[str, ...], flat: torch.Tensor, clock: int) -> Handle:
        """Push several tensors of one dtype that lie side by side in ``flat``."""
        return self._send(Kind.PUSH, keys, flat, self.wire, clock, f"push of {named(keys)} at clock {clock}")

    def assign(self, keys: tuple[str, ...], flat: torch.Tensor) -> Handle:
        """Overwrite several tensors of one dtype that lie side by side in ``flat``."""
        return self._send(Kind.INIT, keys, flat, None, -1, f"first value of {named(keys)}")

    def _send(
        self, kind: Kind, keys: tuple[str, ...], flat: torch.Tensor, wire: torch.dtype | None, clock: int, what: str
    ) -> Handle:
        flat = flat.reshape(-1).to(device="cpu", dtype=wire or flat.dtype).contiguous()
        data, itemsize, code = flat.view(torch.uint8), flat.element_size(), WIRE_CODES[flat.dtype]
        messages = [
            Message(
                span.server,
                (clock, 0, span.first),
                Header(kind, span.first, span.slices, clock=max(0, clock), wire=code),
                data[span.start * itemsize : span.stop * itemsize],
            )
            for span in self._spans_of(keys)
        ]
        handle = self.client.submit(PendingRequests(self.client, what), messages)
        self.client.poll()
        return handle

    def _spans_of(self, keys: tuple[str, ...]) -> list[Span]:
        """The spans that carry these tensors, which lie side by side in a flat tensor."""
        if keys not in self._spans:
            spans: list[Span] = []
            placement, base = self.keys.placement, 0
            for key in keys:
                entry = self.keys.entry_of[key]
                itemsize = placement.entries[entry].dtype.itemsize
                for owned in placement.of_entry[entry]:
                    start, stop = base + owned.start, base + owned.stop
                    last = spans[-1] if spans else None
                    if (
                        last is not None
                        and (last.server, last.first + last.slices, last.stop) == (owned.server, owned.number, start)
                        and (stop - last.start) * itemsize <= MESSAGE_BYTES
                    ):
                        spans[-1] = last._replace(slices=last.slices + 1, stop=stop)
                    else:
                        spans.append(Span(owned.server, owned.number, 1, start, stop))
                base += placement.entries[entry].numel
            self._spans[keys] = spans
        return self._spans[keys]

    # Pulls.

    def pull_into(self, key: str, out: torch.Tensor, clock: int, follows: Handle | None = None) -> Handle:
        """Pull the value of one key into ``out``, wherever and however ``out`` lies. ``follows``: the push of the same
        key in the clock before, which this pull follows slice by slice, so that values come back while the rest is
        still being pushed."""
        target = out.detach()
        count_write((target,))
        direct = target.is_contiguous() and target.is_cpu
        flat = target.view(-1) if direct else torch.empty(target.numel(), dtype=target.dtype, device="cpu")

        def copy() -> None:
            if not direct:
                target.copy_(flat.view(target.shape))

        return self._pull((key,), flat, clock, self.wire, out, copy, follows)

    def pull_flat(self, keys: tuple[str, ...], flat: torch.Tensor, clock: int, wire: torch.dtype | None) -> Handle:
        """Pull values side by side into ``flat`` (1-D, contiguous, CPU)."""
        return self._pull(keys, flat, clock, wire, flat, lambda: None, None)

    def _pull(
        self,
        keys: tuple[str, ...],
        flat: torch.Tensor,
        clock: int,
        wire: torch.dtype | None,
        result: torch.Tensor,
        use: Callable[[], None],
        follows: Handle | None,
    ) -> Handle:
        """``use()`` is called when the values lie in ``flat``."""
        landing = flat if wire in (None, flat.dtype) else torch.empty(flat.numel(), dtype=wire, device="cpu")
        data, itemsize, code = landing.view(torch.uint8), landing.element_size(), WIRE_CODES[landing.dtype]

        def complete(call: PendingRequests) -> None:
            if landing is not flat:
                flat.copy_(landing)
            use()
            version = min(answer.clock for answer in call.answers)
            self.versions.update(dict.fromkeys(keys, version))

        call = PendingRequests(self.client, f"pull of {named(keys)} at clock {clock}", result, complete, follows)
        urgency = clock if follows is None else clock - 1
        messages = [
            Message(
                span.server,
                (urgency, 0, span.first),
                Header(Kind.PULL, span.first, span.slices, clock=clock, wire=code),
                target=data[span.start * itemsize : span.stop * itemsize],
            )
            for span in self._spans_of(keys)
        ]
        handle = self.client.submit(call, messages)
        self.client.poll()
        return handle

    # The other requests.

    def send_hypers(
        self, clock: int, optimizer: torch.optim.Optimizer | None, lr_factor: float, grad_scale: float
    ) -> None:
        """Before the first push of a clock: send the servers the clock's hyper-parameters, if these differ from those
        that the servers know."""
        if self._hypers_clock == clock:
            return
        self._hypers_clock = clock
        groups = None
        if optimizer is not None:
            groups = [
                {key: _plain(value) for key, value in entry.items() if key not in ("params", "param_names")}
                for entry in optimizer.param_groups
            ]
            for entry in groups:
                entry["lr"] *= lr_factor
        text = json.dumps({"groups": groups, "scale": grad_scale}).encode()
        if text != self._sent_hypers:
            self._sent_hypers = text
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self.ask_all(Header(Kind.HYPER), (clock, -1, 0), f"hyper-parameters of clock {clock}", data)

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
        return self.client.submit(PendingRequests(self.client, what, complete=complete), messages)

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
        call = PendingRequests(self.client, what, complete=complete)
        return self.client.submit(call, [Message(server, order, header, data)])


def _plain(value: Any) -> Any:
    """A hyper-parameter as JSON has it."""
    return value.item() if torch.is_tensor(value) else value


def named(keys: tuple[str, ...]) -> str:
    """``keys`` as messages name them."""
    return repr(keys[0]) if len(keys) == 1 else f"{keys[0]!r} .. {keys[-1]!r}"
