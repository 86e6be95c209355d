"""Operations that a transport runs by itself: the schedule compiled, and the buffer described for native code.

The Python executor (:mod:`.execute`) is the reference: it runs the same schedules on every transport, and a program
must give its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..chunks import EMPTY, Range
from ..native.dtypes import HALVES, MOVED, OP_CODES
from ..native.library import built
from ..schedules.compile import Program, compile_schedule
from ..schedules.step import Schedule
from ..transport.base import Offload, Pending
from .group import Group

SEGMENT_BYTES = 256 * 1024
"""A segment that has arrived is checked, reduced and sent on while it is still in a cache; docs/links.md."""

PROGRAMS = 256
"""Of one group; then all are forgotten."""


def native_operand(
    flat: torch.Tensor,
    op: str,
    divisor: float,
    meets_at_owner: bool,
    own: Range,
    wide: torch.Tensor | None = None,
) -> tuple[Any, Any]:
    """The native module's operand, by the rules of :func:`commlab.runtime.operand.operand_of`: how a program treats
    this buffer; and the tensors that must live as long."""
    assert built is not None
    halves = flat.dtype in HALVES
    sums = None
    if halves and meets_at_owner:
        sums = torch.empty(own.numel, dtype=torch.float32, device="cpu") if wide is None else wide
    code, _ = MOVED[flat.dtype]
    address, start, numel = (0, 0, 0) if sums is None else (sums.data_ptr(), own.start, own.numel)
    divides_first = halves and not meets_at_owner and divisor != 1
    operand = built.LinksOperand(
        flat.data_ptr(),
        flat.numel(),
        code,
        OP_CODES[op],
        divisor,
        divides_first,
        address if numel else 0,
        start,
        numel,
        wide is None,
    )
    return operand, (flat, sums)


def program_launch(
    transport: Any,
    key: tuple[Any, ...],
    schedule: Callable[[], Schedule],
    flat: torch.Tensor,
    operand: tuple[Any, Any],
    segment_bytes: int = SEGMENT_BYTES,
) -> Offload:
    """The launch of ``schedule()`` on ``flat``. ``key``: what the schedule follows from, beside the buffer's length."""
    assert built is not None
    itemsize, numel = flat.element_size(), flat.numel()
    key = (key, numel, itemsize, segment_bytes)
    found = transport.programs.get(key)
    if found is None:
        if len(transport.programs) >= PROGRAMS:
            transport.programs.clear()
        program = compile_schedule(schedule(), numel, transport.size, max(1, segment_bytes // itemsize))
        found = transport.programs[key] = native_program(program), program.elements_sent, program.messages_sent
    native, elements_sent, messages_sent = found
    return Offload(operand[0], operand[1], native, None, elements_sent * itemsize, messages_sent)


def native_program(program: Program) -> Any:
    """The program as the native module keeps it."""
    assert built is not None
    return built.LinksProgram(program.table(), *program.successors(), program.numel, program.size)


def few_launch(flat: torch.Tensor, few: tuple[int, bool], op: str, divisor: float, messages: int) -> Offload:
    """The launch of an allreduce whose numbers travel with the announcement, as ``few`` of :class:`Offload` says."""
    operand, keep = native_operand(flat, op, divisor, False, EMPTY)
    return Offload(operand, keep, None, few, messages * few[0], messages)


def finish(group: Group, transport: Any, launch: Offload) -> Pending:
    """Go on once ``launch``, which is started now where it was not announced, has ended; count what it sent."""
    if launch.request is None:
        launch.request = transport.launch(b"", launch)
    while not launch.request.test():
        yield launch.request
    group.bytes_sent += launch.bytes_sent
    group.messages_sent += launch.messages_sent
