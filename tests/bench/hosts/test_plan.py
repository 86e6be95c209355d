"""The plan of the emulated network."""

from __future__ import annotations

import pytest

from bench.hosts.plan import HostLink, host_names, plan


def test_the_plan_names_every_host_once_and_shapes_both_ends_of_every_link() -> None:
    link = HostLink.parse("250kbit", "2.5ms")
    names = host_names(5)
    setup = plan(names, link)
    assert len(set(names) | set(host_names(5))) == 10
    assert [s.command[1] for s in setup if s.command[0] == "hostname"] == list(names)
    shaped = [(s.host, s.command[4]) for s in setup if "tbf" in s.command]
    assert sorted(shaped, key=str) == sorted(
        [(k, "eth0") for k in range(5)] + [(None, f"port{k}") for k in range(5)], key=str
    )
    assert all("250000bit" in s.command for s in setup if "tbf" in s.command)
    assert [s.host for s in setup if "netem" in s.command] == list(range(5))
    assert link.least_time_s(link.burst_bytes + 31_250) == pytest.approx(1.0)
