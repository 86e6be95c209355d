"""The messages between workers and servers: fixed binary headers, and every size and limit. Nothing is pickled.

    header (48 bytes, little-endian)                                                       then ``length`` bytes
    magic version kind wire flag | key slices | sequence | clock | length | value          numbers, JSON or text

All messages of a pair of ranks travel in order on a communicator of their own, so no message needs a tag: the header
tells what follows. ``key`` is the number of a slice among those of its server (:mod:`commlab.ps.placement`); one
message may carry several adjoining ``slices``.

Many small tensors travel in one *frame* (:mod:`commlab.ps.frames`): a request, or an answer, about any slices of one
dtype. The server answers a frame's entries as if each had come alone, as many in one message as it can.

    header: ``key`` entries    table: (first, slices) of each entry    versions (VALUES_FRAME)    numbers, or a reason
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

import torch

from ..errors import CommlabError
from ..native.dtypes import DTYPES

MAGIC = b"cmPS"
VERSION = 3
MESSAGE_BYTES = 2**20
"""The most bytes of numbers in one message, for which a more urgent message may have to wait
(docs/parameter-server.md)."""
IN_FLIGHT = 2
"""The most messages to one peer that the transport is handed at a time; those that wait are still sorted by urgency."""
TEXT_BYTES = 2**20
"""The most bytes of an error or of a report."""
SMALL_BYTES = 8 * 1024
"""Calls of up to so many bytes travel in frames, together with others: copying the numbers costs less than a message of
their own."""
FRAME_BYTES = 64 * 1024
"""A frame with so many bytes of numbers leaves at once."""
FRAME_ENTRIES = 512
"""A frame with so many entries leaves at once, so that the server is busy while the next one is filled."""
STATE_BYTES = 16 * MESSAGE_BYTES
"""The most bytes of an optimizer's state of one slice: some tensors as large as the slice, in up to twice its
precision."""

_STRUCT = struct.Struct("<4sBBBBIIqqqd")
HEADER_BYTES = _STRUCT.size
NO_WIRE = 255


class Kind(IntEnum):
    """What a message asks for, or answers. Workers send requests, kinds below ``ACK``, and every request is answered
    once. ``VERDICT``, and ``CLOSE`` at the end, also go from server to server, where nothing is answered."""

    INIT = 1
    """The first values of slices, or values that overwrite others."""
    PUSH = 2
    """An update of slices: a gradient, or numbers to add where there is no optimizer."""
    PULL = 3
    """A request for the values of slices."""
    CLOCK = 4
    """The worker has ended clock ``clock``; ``flag``: whether all that the worker pushed in this clock was finite."""
    HYPER = 5
    """Hyper-parameters (JSON) of all that the worker will push from now on."""
    TICKET = 6
    """A request for the next number of a count that all workers share."""
    REPORT = 7
    """A request for the server's report."""
    LEAVE = 8
    """The worker pushes no more: nobody waits for its clock any longer."""
    CLOSE = 9
    """The sender sends nothing more: a worker that has closed its store, or a server all of whose workers have."""
    VERDICT = 10
    """``value``: the sum of the squares of the sending server's share of the clock's gradient; ``flag``: whether all
    of this share is finite."""
    GET_STATE = 11
    """A request for what the optimizer remembers of one slice."""
    SET_STATE = 12
    """What the optimizer is to remember of one slice from now on."""
    PUSH_FRAME = 13
    """``PUSH`` of many entries; with ``wire`` NO_WIRE and no numbers (BSP only): the worker has no gradient for them in
    this clock."""
    PULL_FRAME = 14
    """``PULL`` of many entries."""
    ACK = 64
    """The answer to a request that was carried out and asked for nothing."""
    VALUES = 65
    """The answer to ``PULL``; ``value``: the staleness of this read, in clocks."""
    TEXT = 66
    """The answer to ``REPORT`` (JSON)."""
    ERROR = 67
    """The answer to a request that was refused: the reason, as text; ``flag``: whether the request can't be, else it
    has waited too long for a worker. With ``sequence`` 0 no answer: the server has failed, and answers nothing more."""
    STATE = 68
    """The answer to ``GET_STATE``."""
    VALUES_FRAME = 69
    """An answer to ``PULL_FRAME``: the values of those entries that can be read."""
    REFUSED_FRAME = 70
    """An answer to ``PUSH_FRAME`` or ``PULL_FRAME``: these entries were refused, for one reason; ``flag`` as in
    ``ERROR``. Of a ``PUSH_FRAME`` the others were taken in, which ``ACK`` tells."""


WIRE_CODES = {dtype: code for dtype, (code, _) in DTYPES.items() if dtype.is_floating_point}
WIRE_DTYPES = {code: dtype for dtype, code in WIRE_CODES.items()}


class Header(NamedTuple):
    """What stands before the bytes of every message."""

    kind: Kind
    key: int = 0
    """The number of the first slice, among those of the server."""
    slices: int = 0
    """How many slices the message is about, from slice ``key`` on."""
    sequence: int = 0
    """The number of the request, counted by the worker; the answer repeats the number."""
    clock: int = 0
    """The clock of a request; in ``VALUES`` the version of the values, in the answer to ``TICKET`` the ticket."""
    wire: int = NO_WIRE
    """The dtype, as in ``WIRE_CODES``, of the numbers that follow, or that are asked for."""
    length: int = 0
    """How many bytes follow the header."""
    value: float = 0.0
    """The squares of ``VERDICT`` and of the answer to ``CLOCK``, or the staleness of ``VALUES``."""
    flag: bool = True
    """Whether the numbers that ``CLOCK``, its answer or ``VERDICT`` stands for were finite."""

    def pack(self) -> bytes:
        return _STRUCT.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.wire,
            self.flag,
            self.key,
            self.slices,
            self.sequence,
            self.clock,
            self.length,
            self.value,
        )

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that ``wire`` stands for; None for a code that this version does not know."""
        return WIRE_DTYPES.get(self.wire)


def unpack(data: bytes, frm: str) -> Header:
    """The header in ``data``. CommlabError, naming ``frm``, for a header that this version can't read: where the next
    message begins is not known then."""
    magic, version, kind, wire, flag, key, slices, sequence, clock, length, value = _STRUCT.unpack(data)
    if magic != MAGIC:
        raise CommlabError(f"{frm} sent {data[:8].hex()} where a parameter server's header begins with {MAGIC.hex()}")
    if version != VERSION:
        raise CommlabError(f"{frm} speaks version {version} of the parameter server's messages, this rank {VERSION}")
    if kind not in Kind.__members__.values():
        raise CommlabError(f"{frm} sent a message of kind {kind}, which version {VERSION} does not have")
    most = STATE_BYTES if kind in (Kind.SET_STATE, Kind.STATE) else max(MESSAGE_BYTES, TEXT_BYTES)
    if not 0 <= length <= most:
        raise CommlabError(f"{frm} sent a message of {length} B; the most is {most} B")
    return Header(Kind(kind), key, slices, sequence, clock, wire, length, value, bool(flag))
