"""Congestion control: by which rule the kernel decides how fast a connection sends.

BBR, the default of some systems, sends at the rate that it has measured lately. An operation is a burst, and then
nothing while its rank computes; BBR measures the pauses too, and holds the next burst back (docs/links.md has figures).
On long ways that lose packets it is worth that, within a cluster it is not. Rules that answer to losses alone let a
burst go as fast as it is taken.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from typing import Final

from ..errors import UsageError

CONGESTION: Final = "COMMLAB_CONGESTION"
"""This variable names the rule of all connections; ``system`` leaves what the system has chosen."""

NEAR_S: Final = 1e-3
"""A way there and back that is so short is one within a cluster: a loss is made good before it costs much."""

BY_LOSS: Final = ("cubic", "reno")
"""The better one first. An ordinary user may set what ``net.ipv4.tcp_allowed_congestion_control`` names; reno is always
among it."""

_SYSTEM = "system"
_NAME_BYTES = 16
_INFO_BYTES, _RTT_US_AT, _LEAST_RTT_US_AT = 152, 68, 148  # of struct tcp_info, whose end older kernels don't know


def require_congestion() -> None:
    """UsageError where :data:`CONGESTION` names a rule that can't be had here."""
    named = _named()
    if not named or named == _SYSTEM:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        try:
            _set(tried, named)
        except OSError as error:
            raise UsageError(
                f"{CONGESTION}={named}: the kernel has or allows no such congestion control ({error.strerror}); "
                f"net.ipv4.tcp_allowed_congestion_control says which there are, and {_SYSTEM} changes nothing"
            ) from None


def begin_congestion(unconnected: socket.socket) -> None:
    """Give a socket that will connect or listen the rule that is named; where none is, another one than BBR. A
    connection that has begun with BBR would keep its timer, and send by that under any other rule."""
    named = _named()
    if named:
        if named != _SYSTEM:
            _set(unconnected, named)
        return
    if not _paces(congestion_of(unconnected)):
        return
    for name in BY_LOSS:
        with suppress(OSError):
            _set(unconnected, name)
            return


def settle_congestion(connected: socket.socket) -> None:
    """Give the system's rule back to a connection that has turned out to be a long way."""
    if _named() or round_trip_s(connected) <= NEAR_S:
        return
    with socket.socket(connected.family, socket.SOCK_STREAM) as fresh:
        usual = congestion_of(fresh)
    if _paces(usual):
        _set(connected, usual)


def congestion_of(connection: socket.socket) -> str:
    """The name of the rule that a connection follows."""
    name = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _NAME_BYTES)
    return name.split(b"\0", 1)[0].decode()


def round_trip_s(connection: socket.socket) -> float:
    """The shortest way there and back that the kernel has seen on a connection."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    at = _LEAST_RTT_US_AT if len(info) >= _INFO_BYTES else _RTT_US_AT
    return float(struct.unpack_from("=I", info, at)[0]) * 1e-6


def _paces(name: str) -> bool:
    return name.startswith("bbr")


def _named() -> str:
    return os.environ.get(CONGESTION, "")


def _set(connection: socket.socket, name: str) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
