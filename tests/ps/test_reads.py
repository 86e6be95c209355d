"""Stores of several ranks in one process: what a pull reads, by the consistency and by what was pushed before."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from sim_stores import play
from training import alone

from commlab.errors import UsageError
from commlab.ps.store import ParameterServer


def test_a_pull_after_a_push_reads_the_clocks_update() -> None:
    """A17: pull after push within one clock, whoever is faster: with all workers' pushes of the clock. Before the push:
    without any."""
    big, small = torch.zeros(5000), torch.zeros(3)

    def script(store: ParameterServer, worker: int) -> None:
        for step in range(6):
            for key, like in (("big", big), ("small", small), ("other", small)):
                out = torch.empty_like(like)
                if (step + worker) % 3 == 0:
                    time.sleep(0.003)
                assert (store.pull(key, out).wait() == 1.5 * step).all(), "before the push"
                pushed = store.push(key, torch.full_like(like, 1.0 + worker))
                pulled = store.pull(key, out)
                if (step + worker) % 2:
                    pushed.wait()
                assert (pulled.wait() == 1.5 * (step + 1)).all(), "after the push"
            both = torch.empty(6)
            assert (store.pull_flat(("small", "other"), both).wait() == 1.5 * (step + 1)).all()
            store.step()

    play(3, script, [("big", big), ("small", small), ("other", small.clone())], None, "bsp")


def test_a_flat_pull_of_pushed_and_other_keys_reads_each_at_its_clock() -> None:
    """A17: each key by its own rule."""

    def script(store: ParameterServer, worker: int) -> None:
        flat = torch.empty(9)
        for keys in (("a", "b", "c"), ("c", "b", "a")):
            store.push("b", torch.ones(3)).wait()
            store.pull_flat(keys, flat).wait()
            step = store.clock
            wanted = {"a": 10.0, "b": 21.0 + step, "c": 30.0}
            assert torch.equal(flat, torch.tensor([wanted[key] for key in keys]).repeat_interleave(3))
            store.step()

    values = [("a", torch.full((3,), 10.0)), ("b", torch.full((3,), 20.0)), ("c", torch.full((3,), 30.0))]
    play(3, script, values)


@pytest.mark.parametrize(
    ("consistency", "options"), [("bsp", {"max_grad_norm": 1e9}), ("bsp", {"skips": True}), ("ssp:0", {})]
)
def test_waiting_for_what_needs_this_workers_own_step(consistency: str, options: dict[str, Any]) -> None:
    """A17: it can't come before; that is said at once, and the handle is good once ``step()`` was called."""

    def script(store: ParameterServer, worker: int) -> None:
        out = torch.empty(3)
        pulled = store.push_pull("w", torch.ones(3), out)
        with pytest.raises(UsageError, match=r"pull of 'w' at clock 1 can't be answered before .* call step\(\) first"):
            pulled.wait()
        store.step()
        pulled.wait()
        assert (out == (1.0 if consistency == "bsp" else 2.0)).all() or consistency != "bsp"

    play(3, script, [("w", torch.zeros(3))], None, consistency, **options)


def test_under_asp_a_worker_reads_its_own_pushes() -> None:
    """A17: also where pushes and pulls wait to share messages."""
    values = [(f"k{at}", torch.zeros(2)) for at in range(40)]

    def script(store: ParameterServer, worker: int) -> None:
        outs = [torch.empty(2) for _ in values]
        for step in range(5):
            order = [(at * 17 + step) % 40 for at in range(40)]
            for at in order[:20]:
                store.push(f"k{at}", torch.ones(2))
                store.pull(f"k{(at + 1) % 40}", torch.empty(2))
            pulls = {at: store.pull(f"k{at}", outs[at]) for at in reversed(order)}
            before = {at: len([1 for earlier in range(step + 1) if at in _first(earlier)]) for at in order}
            for at, pull in pulls.items():
                assert (pull.wait() == before[at]).all(), (step, at)
            store.step()

    def _first(step: int) -> set[int]:
        return {(at * 17 + step) % 40 for at in range(20)}

    play(2, script, values, None, "asp")


def test_where_torch_makes_tensors_elsewhere() -> None:
    """B24: the store's own memory is the CPU's."""
    values = [(f"k{at}", torch.full((3,), float(at), device="cpu")) for at in range(5)]
    grads = [torch.ones(3, device="cpu") for _ in values]
    outs = [torch.empty(3, device="cpu") for _ in values]
    with torch.device("meta"):
        store = ParameterServer(values, lambda params: torch.optim.Adam(params, lr=0.5), group=alone())
        for push in [store.push(name, grad) for (name, _), grad in zip(values, grads, strict=True)]:
            push.wait()
        store.step()
        for pull in [store.pull(name, out) for (name, _), out in zip(values, outs, strict=True)]:
            pull.wait()
        store.close()
    for (_, value), out in zip(values, outs, strict=True):
        assert torch.allclose(out, value - 0.5)
