"""What workers and servers say to each other: fixed binary headers, and every size and limit. Nothing is pickled.

    header (48 bytes, little-endian)                                                       then `length` bytes
    magic version kind wire flag | key parts | sequence | clock | length | value           numbers, or JSON

All messages of a pair of ranks travel in order on a communicator of their own, so none of them needs a tag: the header
says what follows. ``key`` is the index of a part among those of its server (:mod:`commlab.ps.placement`); one message may
carry several ``parts`` that adjoin.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

import torch

from ..errors import CommlabError
from ..native.dtypes import DTYPES

MAGIC = b"cmPS"
VERSION = 2
MESSAGE_BYTES = 2**20
"""The most bytes of numbers in one message: what a more urgent one may have to wait for (docs/parameter-server.md)."""
IN_FLIGHT = 2
"""Messages to one peer that have been handed to the transport; what waits behind them is still sorted by urgency."""
TEXT_BYTES = 2**20
"""The most that an error or a report may be long."""
STATE_BYTES = 16 * MESSAGE_BYTES
"""The most that an optimizer's state of one part may be long: some tensors as large as the part, in up to twice its
precision."""

_STRUCT = struct.Struct("<4sBBBBIIqqqd")
HEADER_BYTES = _STRUCT.size
NO_WIRE = 255


class Kind(IntEnum):
    """Requests, from workers; VERDICT alone is said by one server to the others. Every request is answered once."""

    INIT = 1
    """First values of parts."""
    PUSH = 2
    PULL = 3
    CLOCK = 4
    """This worker has ended clock ``clock``; ``flag``: all that it pushed was finite."""
    HYPER = 5
    """JSON: hyper-parameters of what this worker pushes from here on."""
    TICKET = 6
    """The next number of a count that all workers share."""
    REPORT = 7
    LEAVE = 8
    """This worker pushes no more: nobody waits for its clock any longer."""
    CLOSE = 9
    """Nor does it say anything more."""
    VERDICT = 10
    """``value``: sum of the squares of this server's part of the step's gradient; ``flag``: all of it is finite."""
    GET_STATE = 11
    """Of one part, as the optimizer has it."""
    SET_STATE = 12
    ACK = 64
    VALUES = 65
    """Answer to PULL; ``value``: the staleness of this read, in clocks."""
    TEXT = 66
    ERROR = 67
    STATE = 68
    """Answer to GET_STATE."""


WIRE_CODES = {dtype: code for dtype, (code, _) in DTYPES.items() if dtype.is_floating_point}
WIRE_DTYPES = {code: dtype for dtype, code in WIRE_CODES.items()}


class Header(NamedTuple):
    kind: Kind
    key: int = 0
    parts: int = 0
    """How many, from part ``key`` on."""
    sequence: int = 0
    """Of the request, counted by the worker; its answer repeats it."""
    clock: int = 0
    wire: int = NO_WIRE
    """A dtype as WIRE_CODES has it: of the numbers that follow, or that are asked for."""
    length: int = 0
    """Bytes that follow the header."""
    value: float = 0.0
    flag: bool = True

    def pack(self) -> bytes:
        return _STRUCT.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.wire,
            self.flag,
            self.key,
            self.parts,
            self.sequence,
            self.clock,
            self.length,
            self.value,
        )

    def answer(self, kind: Kind, length: int = 0, value: float = 0.0, flag: bool = True) -> Header:
        """The header of the answer to this request."""
        return self._replace(kind=kind, length=length, value=value, flag=flag)

    @property
    def dtype(self) -> torch.dtype | None:
        return WIRE_DTYPES.get(self.wire)


def unpack(data: bytes, frm: str) -> Header:
    """The header in ``data``. CommlabError, naming ``frm``, for one that this version can't read: what follows it
    can't be told apart any more."""
    magic, version, kind, wire, flag, key, count, sequence, clock, length, value = _STRUCT.unpack(data)
    if magic != MAGIC:
        raise CommlabError(f"{frm} sent {data[:8].hex()} where a parameter server's header begins with {MAGIC.hex()}")
    if version != VERSION:
        raise CommlabError(f"{frm} speaks version {version} of the parameter server's messages, this rank {VERSION}")
    if kind not in Kind.__members__.values():
        raise CommlabError(f"{frm} sent a message of kind {kind}, which version {VERSION} does not have")
    most = STATE_BYTES if kind in (Kind.SET_STATE, Kind.STATE) else max(MESSAGE_BYTES, TEXT_BYTES)
    if not 0 <= length <= most:
        raise CommlabError(f"{frm} sent a message of {length} B; the most is {most} B")
    return Header(Kind(kind), key, count, sequence, clock, wire, length, value, bool(flag))
