"""Stores of several ranks in one process: a worker that leaves, drops its store or does not come, and who waits."""

from __future__ import annotations

import gc
import re
import threading
from typing import Any

import pytest
import torch
from sim_stores import groups, play

from commlab.errors import PeerTimeoutError, UsageError
from commlab.ps.store import ParameterServer


def test_a_push_that_waits_for_a_worker_that_leaves_is_told_at_once() -> None:
    """B3: a push held for a worker that has left, or leaves while the push waits."""
    values = [("big", torch.zeros(5000)), *((f"k{at}", torch.zeros(3)) for at in range(5))]
    waits = threading.Event()

    def script(store: ParameterServer, worker: int) -> None:
        if worker == 1:
            for name, value in values:
                store.push(name, torch.ones_like(value)).wait()
            waits.wait(20)
            store.leave()
            return
        for name, value in values:
            store.push(name, torch.ones_like(value)).wait()
        store.step()
        out = torch.empty(5000)
        assert (store.pull("big", out).wait() == 1).all(), "the round of clock 0 is whole: both have pushed"
        store.push("k0", torch.ones(3))
        held = [store.push(name, torch.ones_like(value)) for name, value in values if name != "k0"]
        store.step()
        later = [store.push(name, torch.ones_like(value)) for name, value in values]
        assert not any(push.done() for push in later)
        waits.set()
        for push in (*held, *later):
            try:
                push.wait()
            except UsageError as error:
                text = "waits at clock [12] for worker rank 1 \\(at clock 0\\), which has left; under bsp all workers"
                assert re.search(text, str(error)), error
            else:
                assert push in held, "of clock 1 there is a round that others could still complete"

    play(3, script, values)


@pytest.mark.parametrize("consistency", ["ssp:1", "asp"])
def test_a_worker_that_drops_its_store_holds_nobody_back(consistency: str) -> None:
    """B19: a worker that returns without close()."""

    def on_rank(rank: int) -> float:
        store = ParameterServer([("w", torch.zeros(3))], None, consistency, group=everyone[rank])
        if store.role == "server":
            return 0.0
        out = torch.empty(3)
        for _ in range(1 if store.group.rank else 5):
            store.push("w", torch.ones(3))
            store.pull("w", out).wait()
            store.step()
        return float(store.pull("w", out).wait()[0])  # and the store is gone

    from crew import Crew

    gc.disable()  # it is gone at once, not when garbage is collected
    everyone, crew = groups(3), Crew(3)
    try:
        found = crew.all(on_rank)
    finally:
        gc.enable()
        crew.close()
    assert found[0] >= 5.0


def test_a_worker_that_is_waited_for_too_long_is_a_timeout() -> None:
    """B26: a stopped worker under ssp, and a push held for one under bsp: PeerTimeoutError, which names it."""
    over = threading.Event()

    def waits_for(consistency: str, call: Any) -> None:
        def script(store: ParameterServer, worker: int) -> None:
            if worker == 1:
                over.wait(20)
                return
            try:
                with pytest.raises(
                    PeerTimeoutError, match=r"worker rank 0 has waited .* for worker rank 1 \(at clock 0\)"
                ):
                    call(store)
            finally:
                over.set()

        over.clear()
        values = [("w", torch.zeros(3)), ("big", torch.zeros(5000)), ("v", torch.zeros(3))]
        play(3, script, values, None, consistency, timeout_s=1.0)

    def pulls(store: ParameterServer) -> None:
        for _ in range(3):
            store.step()
        handles = [store.pull(key, torch.empty(3)) for key in ("w", "v")]
        for handle in handles:
            handle.wait()

    def pushes(store: ParameterServer) -> None:
        store.step()
        store.push("big", torch.ones(5000)).wait()

    def frames(store: ParameterServer) -> None:
        store.step()
        handles = [store.push(key, torch.ones(3)) for key in ("w", "v")]
        handles[1].wait()

    waits_for("ssp:1", pulls)
    waits_for("bsp", pushes)
    waits_for("bsp", frames)
