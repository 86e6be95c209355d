"""Links of emulated hosts are never faster than they promise."""

from __future__ import annotations

import pytest
from emulated import namespaces_of, needs_hosts

from bench.hosts.check import measure_stream
from bench.hosts.namespaces import Cluster
from bench.hosts.plan import HostLink


@needs_hosts
@pytest.mark.parametrize("rate", ["20mbit", "200mbit"])
def test_no_stream_is_faster_than_the_link(rate: str, made: set[str]) -> None:
    link = HostLink.parse(rate)
    with Cluster(2, link) as cluster:
        made |= namespaces_of(cluster)
        arrived_bytes, seconds, _ = measure_stream(cluster, 0, 1, seconds=0.7)
    # Only from above: a busy machine may be slower. The clock starts when the first bytes have already arrived, so one
    # bucket of each of the two shapers can lie in between them and the clock.
    assert seconds >= link.least_time_s(arrived_bytes - link.burst_bytes)
    assert arrived_bytes > link.burst_bytes
