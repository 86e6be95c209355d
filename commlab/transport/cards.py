"""Cards: under which addresses a rank can be reached, told to all ranks over the launcher's channel."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..native.library import built


@dataclass(frozen=True)
class Address:
    """One address of this host. ``mbit_per_s``: the speed of its interface, 0 where the system does not know it."""

    interface: str
    host: str
    loopback: bool
    mbit_per_s: int


@dataclass(frozen=True)
class Card:
    """What the other ranks must know of one rank to connect to it, or to see that they cannot.

    ``network``: equal on two ranks exactly when they see the same interfaces, so that they reach each other over
    loopback. ``checks``: whether its frames carry a CRC32C. ``secret``: its share of the job's key, as hexadecimal
    digits. ``listens``: (host, port) pairs, the best first.
    """

    rank: int
    network: str
    checks: bool
    byte_order: str
    secret: str
    listens: tuple[tuple[str, int], ...] = ()

    def pack(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def unpack(data: bytes) -> Card:
        fields: dict[str, Any] = json.loads(data)
        fields["listens"] = tuple((str(host), int(port)) for host, port in fields["listens"])
        return Card(**fields)


def own_card(rank: int, checks: bool) -> Card:
    """The card of this rank before it listens."""
    return Card(rank, network_key(), checks, sys.byteorder, os.urandom(32).hex())


def network_key() -> str:
    """A text that is equal for two processes exactly when they have the same network interfaces: the kernel's boot id
    and the network namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot_id.read_text().strip()} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return os.urandom(16).hex()  # the same as nobody's


def addresses(iface: str | None, loopback: bool, beyond: bool) -> list[Address]:
    """The addresses to listen on: of loopback, where ranks on this host want it; and ``beyond``, of all other
    interfaces that are up, the fastest first, IPv4 before IPv6. ``iface``: names of interfaces, joined by commas, that
    are used alone. UsageError where such an interface has no address."""
    assert built is not None
    found = [
        Address(name, host, is_loopback, 0 if is_loopback else _speed(name))
        for name, host, is_loopback in built.links_interfaces()
        if not host.startswith("fe80:")  # means something on its own wire only, and another interface's name there
    ]
    if iface:
        wanted = iface.split(",")
        missing = [name for name in wanted if not any(each.interface == name for each in found)]
        if missing:
            there = ", ".join(dict.fromkeys(each.interface for each in found)) or "none"
            raise UsageError(
                f"--iface {iface}: interface {missing[0]} of this host is down, has no address, or does not exist; "
                f"interfaces that are up: {there}"
            )
        return [each for each in found if each.interface in wanted]
    chosen = [each for each in found if (loopback if each.loopback else beyond)]
    return sorted(chosen, key=lambda each: (not each.loopback, -each.mbit_per_s, ":" in each.host))


def _speed(interface: str) -> int:
    try:
        return max(0, int(Path(f"/sys/class/net/{interface}/speed").read_text()))
    except (OSError, ValueError):
        return 0


def require_alike(cards: Sequence[Card]) -> None:
    """UsageError, with both sides, where ranks cannot understand each other's frames. All ranks find the same."""
    for what, values in (
        ("checksums (links_check)", ["on" if card.checks else "off" for card in cards]),
        ("byte order", [card.byte_order for card in cards]),
    ):
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise UsageError(
                f"links: rank 0 has {what} {values[0]}, rank {other} has {values[other]}; all ranks need the same"
            )
