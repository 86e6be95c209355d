"""The monitored barrier: over the store, so that it can name who is missing when nothing else works."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from ..transport.torchstore import wait_for


def monitored_barrier(store: dist.Store, rank: int, size: int, timeout: timedelta, wait_all_ranks: bool) -> None:
    """Rank 0 waits for every rank by name, then tells them how it went. ``store``: of this barrier alone. RuntimeError
    with the first rank that has not come within ``timeout``, or all of them."""
    limit_ms = int(timeout.total_seconds() * 1000)
    if rank == 0:
        missing = _missing(store, size, timeout, wait_all_ranks)
        store.set("verdict", f"missing {missing}" if missing else "all are here")
        if missing:
            # This rank may be the store's home, and end with this error before the others have read why they end.
            reads = [f"read/{peer}" for peer in range(1, size) if peer not in missing]
            if reads:
                wait_for(store, reads, 1.0)
            if limit_ms <= 0:
                raise RuntimeError(f"[Rank 0]: Rank 0 timed out in monitoredBarrier after {limit_ms} ms")
            names = f"Ranks {', '.join(map(str, missing))}" if wait_all_ranks else f"Rank {missing[0]}"
            raise RuntimeError(f"[Rank 0]: {names} failed to pass monitoredBarrier in {limit_ms} ms")
        return
    store.set(f"here/{rank}", "yes")
    # Rank 0 may begin to wait as late as this rank's own limit allows, and then has its own.
    if not wait_for(store, ["verdict"], 2 * timeout.total_seconds()):
        raise RuntimeError(
            f"[Rank {rank}]: Rank {rank} successfully reached monitoredBarrier, but received errors while waiting for "
            f"send/recv from rank 0: nothing within {2 * limit_ms} ms. Please check rank 0 logs for faulty rank"
        )
    verdict = store.get("verdict").decode()
    store.set(f"read/{rank}", "yes")
    if verdict.startswith("missing"):
        raise RuntimeError(
            f"[Rank {rank}]: Rank {rank} successfully reached monitoredBarrier, but received errors while waiting for "
            f"send/recv from rank 0: {verdict.removeprefix('missing ')} failed to pass monitoredBarrier in {limit_ms} "
            "ms. Please check rank 0 logs for faulty rank"
        )


def _missing(store: dist.Store, size: int, timeout: timedelta, wait_all_ranks: bool) -> Sequence[int]:
    """The ranks that have not come; the first one alone where others need not be known."""
    stop_s = time.monotonic() + timeout.total_seconds()
    missing = []
    for peer in range(1, size):
        if not wait_for(store, [f"here/{peer}"], stop_s - time.monotonic()):
            missing.append(peer)
            if not wait_all_ranks:
                break
    return missing
