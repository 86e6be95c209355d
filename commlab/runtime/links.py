"""Which transport the ranks of several nodes get: links of our own, or the launcher's, whichever is faster here."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any, Final

import numpy as np

from ..errors import PeerTimeoutError, UsageError
from ..transport.base import RECORD_BYTES, Transport
from ..transport.handshake import connect
from ..transport.tcp import Links, missing_reason
from .control import gather_bytes
from .group import Group

log = logging.getLogger("commlab")

LINKS: Final = ("auto", "tcp", "mpi")

CONNECT_S = 30.0
"""So long the ranks try to reach each other."""

_PROBE_BYTES: Final = 1 << 20
_PROBES: Final = 5
"""So many exchanges of a record, and of so many bytes, time a transport: some milliseconds in all on 10 Gbit/s."""


def open_links(group: Group, links: str, iface: str | None, checks: bool) -> tuple[Transport, str]:
    """The transport to use, and why: links where ``links`` is ``"tcp"``, or ``"auto"`` and they are faster than the
    transport of ``group``, which all ranks share. Collective. Errors, on all ranks alike: UsageError and
    PeerTimeoutError where links were asked for by name and can't be had."""
    launched = group.transport
    reasons = [reason.decode() for reason in gather_bytes(group, missing_reason().encode(), "reasons against links")]
    reason = next((f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text), "")
    if reason and links == "tcp":
        raise UsageError(f"links 'tcp' can't be had: {reason}")
    if reason:
        return launched, f"no links: {reason}"
    try:
        gather = partial(gather_bytes, group, name="cards of the links")
        descriptors = connect(group.rank, gather, checks, iface, min(CONNECT_S, group.timeout_s))
    except (UsageError, PeerTimeoutError) as error:
        if links == "tcp":
            raise
        if group.rank == 0:
            log.warning("no links between the nodes, which use transport %s: %s", launched.name, error)
        return launched, f"no links: {error}"
    opened = Links(group.rank, descriptors, checks, launched=launched)
    world = opened.world()
    if links == "tcp":
        if len(group.nodes) > 1:
            _, megabyte_s = _measure(group, (world,))
            opened.byte_s = megabyte_s / _PROBE_BYTES
        return world, "links, as asked for"
    ours_record, ours, theirs_record, theirs = _measure(group, (world, launched))
    opened.byte_s = ours / _PROBE_BYTES
    # What a byte costs counts for more than what a message does: gradients are long.
    faster = world if ours <= theirs else launched
    reason = (
        f"{'links' if faster is world else f'transport {launched.name}'} between nodes: 1 MB each way takes links "
        f"{ours * 1e3:.2f} ms and {launched.name} {theirs * 1e3:.2f} ms, a record {ours_record * 1e6:.0f} and "
        f"{theirs_record * 1e6:.0f} us"
    )
    if group.rank == 0:
        log.info("%s", reason)
    if faster is not world:
        opened.engine.leave(1.0)
    return faster, reason


def _measure(group: Group, transports: Sequence[Transport]) -> list[float]:
    """What an exchange of a record takes the first ranks of two nodes over each of ``transports``, and what of 1 MB
    each way; the same figures on all ranks."""
    pair = [node[0] for node in group.nodes[:2]]
    figures: list[tuple[float, float]] = []
    for transport in transports:
        # Of its own, so that no message can meet the group's.
        between = transport.split(pair, transport.contexts.offered)
        if between is not None:
            figures.append(_times_s(between))
            between.close()
    text = " ".join(f"{value:.9f}" for times_s in figures for value in times_s)
    record = gather_bytes(group, text.encode(), "times of the links")[pair[0]].decode()
    return [float(value) for value in record.split()]


def _times_s(transport: Transport) -> tuple[float, float]:
    """What an exchange of a record takes two ranks, and of long messages both ways at once: medians."""
    peer = 1 - transport.rank
    sent, arrived = np.zeros(_PROBE_BYTES, np.uint8), np.empty(_PROBE_BYTES, np.uint8)
    records_s, messages_s = [], []
    for _ in range(_PROBES):
        start_s = time.perf_counter()
        _finish(transport.exchange(bytes(RECORD_BYTES)))
        middle_s = time.perf_counter()
        requests = transport.irecv(arrived, peer), transport.isend(sent, peer)
        for request in requests:
            _finish(request)
        records_s.append(middle_s - start_s)
        messages_s.append(time.perf_counter() - middle_s)
    return median(records_s), median(messages_s)


def _finish(request: Any) -> None:
    block = getattr(request, "block", None)
    while not request.test():
        if block is not None:
            block(0.1)
        else:
            os.sched_yield()
