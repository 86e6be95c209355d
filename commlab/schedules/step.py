"""A schedule is data: what one rank sends, receives and reduces, in order. :mod:`commlab.runtime.execute` runs a
schedule on any transport."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from ..chunks import EMPTY, Range


class Step(NamedTuple):
    """Send ``send`` to rank ``to`` while ``recv`` arrives from rank ``frm``: added into the buffer (``reduce``) or
    written there.

    The peer has the mirror image at the same place of its schedule. ``None`` and an empty range: nothing that way.
    """

    to: int | None
    send: Range
    frm: int | None
    recv: Range
    reduce: bool = False


class Finish(NamedTuple):
    """``chunk`` now holds everyone's contribution: divide it (mean) and round it, once, by its owner."""

    chunk: Range


class Relay(NamedTuple):
    """A step that only receives ``chunk`` and one that only sends it on, together: its first segments leave while the
    last ones arrive. A chain of P ranks takes P chunks' time otherwise."""

    chunk: Range
    frm: int
    to: int
    reduce: bool


class NodeStep(NamedTuple):
    """What a native loop over the window has done for this rank: counted, priced and traced like the other steps."""

    kind: str
    bytes_read: int
    bytes_written: int


AnyStep: TypeAlias = Step | Finish | NodeStep
Schedule: TypeAlias = Iterator[AnyStep]


def step(to: int, send: Range, frm: int, recv: Range, reduce: bool = False) -> Iterator[Step]:
    """A :class:`Step` whose empty sides are dropped; no step at all when both are empty."""
    if send.numel or recv.numel:
        yield Step(
            to if send.numel else None,
            send if send.numel else EMPTY,
            frm if recv.numel else None,
            recv if recv.numel else EMPTY,
            reduce,
        )


def elements_sent(schedule: Iterable[AnyStep]) -> int:
    """How many elements this rank sends."""
    return sum(item.send.numel for item in schedule if isinstance(item, Step))


def messages_sent(schedule: Iterable[AnyStep]) -> int:
    """How many (unsegmented) messages this rank sends."""
    return sum(item.to is not None for item in schedule if isinstance(item, Step))


def with_relays(schedule: Iterable[AnyStep]) -> Iterator[AnyStep | Relay]:
    """The schedule, with neighbouring steps put together that make a relay."""
    held: Step | None = None
    for item in schedule:
        if held is not None and held.frm is not None:
            if isinstance(item, Step) and item.to is not None and item.frm is None and item.send == held.recv:
                yield Relay(held.recv, held.frm, item.to, held.reduce)
                held = None
                continue
            yield held
            held = None
        if isinstance(item, Step) and item.to is None:
            held = item
        else:
            yield item
    if held is not None:
        yield held
