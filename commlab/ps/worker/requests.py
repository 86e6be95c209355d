"""What a worker asks of the servers: keys and flat tensors become messages, answers become handles."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from ..encoding import encode
from ..messages import WIRE_CODES, Header, Kind
from ..placement import Part
from .client import Client, Handle
from .keys import Keys


class Requests:
    """``wire``: the dtype in which pushes travel; None: as they are. Not for several threads at once, but for the
    answers, which any thread that polls ``client`` may take in."""

    def __init__(self, client: Client, keys: Keys, wire: torch.dtype | None):
        self.client, self.keys, self.wire = client, keys, wire
        self.versions: dict[str, int] = {}
        """Of the values that were last pulled."""
        self._every_server = range(len(keys.placement.of_server))
        self._told, self._told_at = b"", -1

    def push(self, keys: tuple[str, ...], flat: torch.Tensor, clock: int) -> Handle:
        """Of several tensors of one dtype that lie side by side in ``flat``."""
        return self._send(Kind.PUSH, keys, flat, self.wire, clock, f"push of {named(keys)} at clock {clock}")

    def assign(self, keys: tuple[str, ...], flat: torch.Tensor) -> Handle:
        return self._send(Kind.INIT, keys, flat, None, -1, f"first value of {named(keys)}")

    def _send(
        self, kind: Kind, keys: tuple[str, ...], flat: torch.Tensor, wire: torch.dtype | None, clock: int, what: str
    ) -> Handle:
        flat = flat.reshape(-1).to(device="cpu", dtype=wire or flat.dtype).contiguous()
        data, itemsize = flat.view(torch.uint8), flat.element_size()
        handle = Handle(self.client, what, None)
        with self.client.lock:
            for run in self.keys.runs_of(keys):
                header = Header(kind, run.first, run.parts, clock=max(0, clock), wire=WIRE_CODES[flat.dtype])
                numbers = data[run.start * itemsize : run.stop * itemsize]
                self.client.request(run.server, (clock, 0, run.first), header, handle, numbers)
        self.client.poll()
        return handle

    def pull_into(self, key: str, out: torch.Tensor, clock: int, pushed_at: int | None = None) -> Handle:
        """The value of one key into ``out``, wherever and however that lies. ``pushed_at``: the clock of a push of the
        same key that this follows part by part, so that values come back while the rest is still being pushed."""
        target = out.detach()
        direct = target.is_contiguous() and target.is_cpu
        flat = target.view(-1) if direct else torch.empty(target.numel(), dtype=target.dtype)
        handle = self.pull_flat((key,), flat, clock, self.wire, pushed_at)
        handle.result = out
        if not direct:
            before = handle.after

            def copy(ended: Handle) -> None:
                if before is not None:
                    before(ended)
                target.copy_(flat.view(target.shape))

            _afterwards(handle, copy)
        return handle

    def pull_flat(
        self,
        keys: tuple[str, ...],
        flat: torch.Tensor,
        clock: int,
        wire: torch.dtype | None,
        pushed_at: int | None = None,
    ) -> Handle:
        """Values side by side into ``flat`` (1-D, contiguous, CPU)."""
        landing = flat if wire in (None, flat.dtype) else torch.empty(flat.numel(), dtype=wire)
        data, itemsize = landing.view(torch.uint8), landing.element_size()
        handle = Handle(self.client, f"pull of {named(keys)} at clock {clock}", flat)

        def arrived(ended: Handle) -> None:
            if landing is not flat:
                flat.copy_(landing)
            for key in keys:
                self.versions[key] = min(answer.clock for answer in ended.answers)

        handle.after = arrived
        with self.client.lock:
            for run in self.keys.runs_of(keys):
                header = Header(Kind.PULL, run.first, run.parts, clock=clock, wire=WIRE_CODES[landing.dtype])
                target = data[run.start * itemsize : run.stop * itemsize]
                order = clock if pushed_at is None else pushed_at, 0, run.first
                self.client.request(run.server, order, header, handle, target=target)
        self.client.poll()
        return handle

    def tell_hypers(
        self, clock: int, optimizer: torch.optim.Optimizer | None, lr_factor: float, grad_scale: float
    ) -> None:
        """Before the first push of a clock: tell the servers its hyper-parameters, if they are not those that they
        know."""
        if self._told_at == clock:
            return
        self._told_at = clock
        groups = None
        if optimizer is not None:
            groups = [
                {key: _plain(value) for key, value in entry.items() if key not in ("params", "param_names")}
                for entry in optimizer.param_groups
            ]
            for entry in groups:
                entry["lr"] *= lr_factor
        text = json.dumps({"groups": groups, "scale": grad_scale}).encode()
        if text != self._told:
            self._told = text
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self.ask_all(Header(Kind.HYPER), (clock, -1, 0), f"hyper-parameters of clock {clock}", data)

    def ask_all(
        self,
        header: Header,
        order: tuple[int, int, int],
        what: str,
        data: torch.Tensor | None = None,
        after: Callable[[Handle], None] | None = None,
    ) -> Handle:
        """The same request to every server; ``after``: called with the last answer."""
        handle = Handle(self.client, what)
        handle.after = after
        with self.client.lock:
            for server in self._every_server:
                self.client.request(server, order, header, handle, data)
        return handle

    def ask(
        self, server: int, header: Header, order: tuple[int, int, int], what: str, data: torch.Tensor | None = None
    ) -> Handle:
        """A request to one of them."""
        handle = Handle(self.client, what)
        self.client.request(server, order, header, handle, data)
        return handle

    def move_state(self, part: Part, state: dict[str, Any] | None, clock: int) -> Handle:
        """Set what the optimizer remembers of a part; None: ask for it."""
        what = f"state of {self.keys.placement.entries[part.entry].name!r}[{part.start}:{part.stop}]"
        header = Header(Kind.GET_STATE if state is None else Kind.SET_STATE, part.number, 1, clock=clock)
        return self.ask(part.server, header, (clock, 2, part.number), what, None if state is None else encode(state))


def _plain(value: Any) -> Any:
    """A hyper-parameter as JSON has it."""
    return value.item() if torch.is_tensor(value) else value


def named(keys: tuple[str, ...]) -> str:
    return repr(keys[0]) if len(keys) == 1 else f"{keys[0]!r} .. {keys[-1]!r}"


def _afterwards(handle: Handle, call: Any) -> None:
    """Run ``call(handle)`` when it ends; now, if it has."""
    if handle.finished:
        call(handle)
    else:
        handle.after = call
