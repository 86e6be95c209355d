"""Which congestion control connections between ranks get, and when they are given the system's back."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from met import connect_all

from commlab.errors import UsageError
from commlab.transport import congestion
from commlab.transport.congestion import (
    BY_LOSS,
    CONGESTION,
    begin_congestion,
    congestion_of,
    round_trip_s,
    settle_congestion,
)
from commlab.transport.tcp import missing_reason

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())


class Kernel:
    """The kernel's part of a socket that is only spoken to about congestion control. ``allowed``: what it may have."""

    family = socket.AF_INET

    def __init__(self, rule: str, allowed: tuple[str, ...], round_trip_us: int = 0, old: bool = False):
        self.rule, self.allowed = rule, allowed
        self.info = bytearray(148 if old else 232)
        for at in (68,) if old else (68, 148):
            self.info[at : at + 4] = round_trip_us.to_bytes(4, "little")
        if not old:
            self.info[68:72] = (90_000).to_bytes(4, "little")  # smoothed: a busy host answers late

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert level == socket.IPPROTO_TCP
        if option == socket.TCP_CONGESTION:
            return self.rule.encode().ljust(size, b"\0")
        assert option == socket.TCP_INFO
        return bytes(self.info[:size])

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_CONGESTION)
        if value.decode() not in self.allowed:
            raise PermissionError(1, "Operation not permitted")
        self.rule = value.decode()

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture(autouse=True)
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONGESTION, raising=False)


@pytest.mark.parametrize(
    ("rule", "allowed", "begun"),
    [
        ("bbr", ("bbr", "reno", "cubic"), "cubic"),
        ("bbr", ("bbr", "reno"), "reno"),
        ("bbr2", ("reno",), "reno"),
        ("bbr", ("bbr",), "bbr"),
        ("cubic", ("reno", "cubic"), "cubic"),
        ("dctcp", ("reno", "cubic"), "dctcp"),
    ],
)
def test_bbr_is_replaced_by_what_is_allowed(rule: str, allowed: tuple[str, ...], begun: str) -> None:
    kernel = Kernel(rule, allowed)
    begin_congestion(kernel)  # type: ignore[arg-type]
    assert kernel.rule == begun


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("round_trip_us", "settled"), [(40, "cubic"), (999, "cubic"), (1001, "bbr"), (80_000, "bbr")])
def test_a_long_way_gets_the_systems_rule_back(
    monkeypatch: pytest.MonkeyPatch, old: bool, round_trip_us: int, settled: str
) -> None:
    allowed = ("bbr", "cubic")
    connected = Kernel("cubic", allowed, round_trip_us, old)
    monkeypatch.setattr(congestion.socket, "socket", lambda *arguments: Kernel("bbr", allowed))
    settle_congestion(connected)  # type: ignore[arg-type]
    assert connected.rule == settled


def test_only_bbr_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = Kernel("westwood", ("cubic",), 80_000)
    monkeypatch.setattr(congestion.socket, "socket", lambda *arguments: Kernel("cubic", ("cubic",)))
    settle_congestion(connected)  # type: ignore[arg-type]
    assert connected.rule == "westwood"


@pytest.fixture
def connections() -> Iterator[list[socket.socket]]:
    """Those of two ranks, made as ranks make them."""
    found = [socket.socket(fileno=fd) for row in connect_all(2) for fd in row if fd >= 0]
    yield found
    for each in found:
        each.close()


def test_connections_of_ranks(connections: list[socket.socket]) -> None:
    with socket.socket() as fresh:
        usual = congestion_of(fresh)
    assert len(connections) == 2
    for each in connections:
        assert 0 < round_trip_s(each) < 1
        assert congestion_of(each) in (BY_LOSS if usual.startswith("bbr") else (usual,))


def test_a_rule_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONGESTION, "reno")  # every kernel has it, and everyone may
    found = [socket.socket(fileno=fd) for row in connect_all(2) for fd in row if fd >= 0]
    assert [congestion_of(each) for each in found] == ["reno", "reno"]
    for each in found:
        each.close()
    with socket.socket() as fresh:
        usual = congestion_of(fresh)
        monkeypatch.setenv(CONGESTION, "system")
        begin_congestion(fresh)
        assert congestion_of(fresh) == usual


def test_a_rule_that_no_kernel_has_is_refused_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONGESTION, "carrier-pigeon")
    for error in connect_all(2):
        assert isinstance(error, UsageError)
        assert str(error).startswith("rank 0: COMMLAB_CONGESTION=carrier-pigeon: the kernel has or allows no such")
        assert "; rank 1: COMMLAB_CONGESTION=carrier-pigeon" in str(error) and "system changes nothing" in str(error)


def test_what_is_allowed_is_told_by_the_kernel() -> None:
    allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
    if not allowed.exists():
        pytest.skip("no such file")
    assert "reno" in allowed.read_text().split()
