"""Stores of several ranks in one process: many keys in few messages, what a pull reads, who is told of what, and what
is refused before anything is sent."""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sim_stores import groups, play
from training import alone

from commlab.errors import CommlabError, PeerTimeoutError, UsageError
from commlab.ps.server.shard import Shard
from commlab.ps.store import ParameterServer

KEYS = 1203
SHAPES = [(), (3,), (2, 5), (0, 4), (17,)]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5, momentum=0.5)


def named(count: int = KEYS) -> list[tuple[str, torch.Tensor]]:
    """Small tensors of many shapes and two dtypes, distinct."""
    made = []
    for at in range(count):
        shape = SHAPES[at % len(SHAPES)]
        value = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) / 8 + at
        made.append((f"layer.{at}", value.to(torch.float64 if at % 7 == 0 else torch.float32)))
    return made


def gradient(at: int, worker: int, step: int, value: torch.Tensor) -> torch.Tensor:
    """Distinct, and exact in every sum of a few."""
    whole = torch.arange(value.numel(), dtype=value.dtype).view(value.shape)
    return whole + (at % 11) + 2 * worker + 4 * step


@contextlib.contextmanager
def unanswered(store: ParameterServer) -> Iterator[None]:
    """No answer is taken in meanwhile: a call alone would leave at once after each, and how many come is chance."""
    for link in store._client.links:
        link._poll_receive = lambda: False  # type: ignore[method-assign]
    yield
    for link in store._client.links:
        del link._poll_receive


@pytest.mark.parametrize("consistency", ["bsp", "asp"])
@pytest.mark.parametrize("order", ["forward", "backward", "mixed"])
def test_many_small_keys_share_messages(consistency: str, order: str) -> None:
    """B20: many small keys. Values are those of a plain loop, whatever the order; messages are few."""
    values, steps, workers = named(), 3, 1 if consistency == "asp" else 2

    def script(store: ParameterServer, worker: int) -> list[torch.Tensor]:
        ways = list(range(KEYS))
        if order == "backward":
            ways.reverse()
        elif order == "mixed":
            ways = [at * 7 % KEYS for at in ways]
        out = [torch.empty_like(value) for _, value in values]
        assert store.optimizer is not None
        for step in range(steps):
            store.optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
            before = sum(link.messages_sent for link in store._client.links)
            # Every third key has no gradient in the second step.
            with unanswered(store):
                pushes = [
                    store.push(
                        values[at][0],
                        None if step == 1 and at % 3 == 0 else gradient(at, worker, step, values[at][1]),
                    )
                    for at in ways
                ]
            for push in pushes:
                push.wait()
            store.step()
            with unanswered(store):
                pulls = [store.pull(values[at][0], out[at]) for at in ways]
            assert all(pull.wait() is out[at] for pull, at in zip(pulls, ways, strict=True))
            sent = sum(link.messages_sent for link in store._client.links) - before
            assert sent <= 32, sent
            versions = {store.version(name) for name, value in values if value.numel()}
            assert versions == ({2 + step} if step == 0 else {1 + step, 2 + step})
        return out

    wanted = [value.clone() for _, value in values]
    optimizer = sgd(wanted)
    for step in range(steps):
        for at, value in enumerate(wanted):
            total = sum(gradient(at, worker, step, value) for worker in range(workers))
            optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
            value.grad = None if step == 1 and at % 3 == 0 else total / workers  # type: ignore[operator]
        optimizer.step()
    for found in play(workers + 2, script, values, sgd, consistency, servers=2):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


def test_one_small_call_waits_for_nothing() -> None:
    """B20: a call alone leaves at once, and what waits for others leaves with the next look."""
    store = ParameterServer([("a", torch.zeros(3)), ("b", torch.zeros(3)), ("c", torch.zeros(3))], group=alone())
    link = store._client.links[0]
    serve, store._client._poll_local = store._client._poll_local, None  # the server answers nothing
    sent = link.messages_sent
    store.push("a", torch.ones(3))
    assert link.messages_sent > sent, "at once"
    sent = link.messages_sent
    store.push("b", torch.ones(3))
    held = store.push("c", torch.ones(3))
    assert link.messages_sent == sent and not link._queue, "while an answer is awaited"
    held.done()
    assert len(link._queue) == 1, "one frame, which two messages under way go before"
    store._client._poll_local = serve
    held.wait()
    store.close()


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


def test_what_is_no_gradient_is_refused_before_anything_is_sent() -> None:
    """B19: arguments of push and pull."""
    store = ParameterServer([("w", torch.zeros(2, 3)), ("b", torch.zeros(3))], sgd, group=alone())
    sent = store.bytes_sent
    wrong: list[tuple[Any, str]] = [
        (np.zeros((2, 3), np.float32), "numpy.ndarray, which is no torch tensor; give a dense torch tensor"),
        ([1.0, 2.0], "builtins.list, which is no torch tensor"),
        (torch.zeros(2, 3).to_sparse(), "a sparse_coo tensor"),
        (torch.zeros(2, 3, device="meta"), "a meta tensor"),
        (torch.zeros(2, 3, dtype=torch.float64), r"a tensor of float64\[2, 3\]"),
        (torch.zeros(3, 2), r"a tensor of float32\[3, 2\]"),
    ]
    for tensor, reason in wrong:
        for call in (store.push, store.pull, lambda key, value: store.push_pull(key, value, torch.zeros(2, 3))):
            with pytest.raises(
                UsageError, match=rf"rank 0: (push|pull|push_pull) of 'w' with .*{reason.lstrip('with ')}"
            ):
                call("w", tensor)
    for key in (b"w", 3, None, ("w",), ["w"]):
        with pytest.raises(UsageError, match=r"no key .*; keys are the tensors' names, as text"):
            store.push(key, torch.zeros(2, 3))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="as text"):
            store.push(key, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="pull of 'w' with an expanded tensor"):
        store.pull("w", torch.zeros(1, 3).expand(2, 3))
    with pytest.raises(UsageError, match=r"push_flat of 2 tensors with float32\[4\]; they have 9 numbers"):
        store.push_flat(("w", "b"), torch.zeros(4))
    with pytest.raises(UsageError, match="no key 'x'"):
        store.pull_flat(("x",), torch.zeros(4))
    assert store.bytes_sent == sent
    # What is right although it is rare.
    out = torch.zeros(3, 2).t()
    negative = torch.complex(torch.zeros(2, 3), torch.ones(2, 3)).conj().imag
    store.push("w", negative)
    store.push("b", torch.ones(1).expand(3))
    store.step()
    assert (store.pull("w", out).wait() == 0.5).all()
    with torch.inference_mode():
        made = torch.zeros(3)
    assert (store.pull("b", made).wait() == -0.5).all()
    saved = torch.ones(3, requires_grad=True)
    product = (saved * saved).sum()
    store.pull("b", saved).wait()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    store.close()
    store.close()
    for call in (store.push, store.pull):
        with pytest.raises(UsageError, match="that was closed"):
            call("b", torch.ones(3))
    for flat in (store.push_flat, store.pull_flat, store.assign_flat):
        with pytest.raises(UsageError, match="that was closed"):
            flat(("b",), torch.ones(3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lr": float("nan")}, r"'lr' of the optimizer's group 0 is nan"),
        ({"lr": torch.tensor(float("nan"))}, r"'lr' of the optimizer's group 0 is nan"),
        ({"lr": float("inf")}, r"'lr' of the optimizer's group 0 is inf"),
        ({"momentum": float("nan")}, r"'momentum' of the optimizer's group 0 is nan"),
        ({"hook": object()}, r"'hook' of the optimizer's group 0 is a object, which can't be sent"),
        ({"lr": torch.ones(2)}, r"'lr' of the optimizer's group 0 is a Tensor"),
    ],
)
def test_hyper_parameters_that_can_not_be(change: dict[str, Any], reason: str) -> None:
    """B19: lr = NaN, and a group entry that is no JSON."""
    store = ParameterServer([("w", torch.zeros(3))], sgd, group=alone())
    assert store.optimizer is not None
    sent, good = store.bytes_sent, dict(store.optimizer.param_groups[0])
    store.optimizer.param_groups[0].update(change)
    with pytest.raises(UsageError, match=rf"rank 0: push at clock 0: {reason}"):
        store.push("w", torch.ones(3))
    assert store.bytes_sent == sent
    store.optimizer.param_groups[0].clear()
    store.optimizer.param_groups[0].update(good)
    store.push("w", torch.ones(3)).wait()
    store.step()
    store.optimizer.add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(UsageError, match="has 2 groups, and the parameter server was built with 1"):
        store.push("w", torch.ones(3))
    store.grad_scale = float("nan")
    with pytest.raises(UsageError, match="grad_scale is nan"):
        store.push("w", torch.ones(3))
    store.close()


def test_hyper_parameters_travel_when_they_have_changed() -> None:
    """B19: also in place, as tensors do; and not again while they are as before."""
    store = ParameterServer([("w", torch.zeros(3))], lambda params: torch.optim.SGD(params, lr=1.0), group=alone())
    assert store.optimizer is not None
    entry, link, before = store.optimizer.param_groups[0], store._client.links[0], torch.zeros(3)

    def push() -> tuple[float, int]:
        """How far a gradient of ones moves the value, and the messages with numbers or hyper-parameters."""
        sent, now = link.messages_sent, torch.empty(3)
        store.push("w", torch.ones(3)).wait()
        messages = link.messages_sent - sent
        store.step()
        store.pull("w", now).wait()
        moved = float((before - now)[0])
        before.copy_(now)
        return moved, messages // 2

    assert [push(), push()] == [(1.0, 2), (1.0, 1)]
    entry["lr"] = 0.5
    assert [push(), push()] == [(0.5, 2), (0.5, 1)]
    entry["lr"] = torch.tensor(0.25)
    assert [push(), push()] == [(0.25, 2), (0.25, 1)]
    entry["lr"].fill_(0.125)
    assert [push(), push()] == [(0.125, 2), (0.125, 1)]
    entry["lr"] = 0.5
    assert push() == (0.5, 2)
    store.lr_factor = 0.5
    assert [push(), push()] == [(0.25, 2), (0.25, 1)]
    store.close()


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        (([("w", np.zeros(3))],), {}, r"the pair \('w', a ndarray\); give text and a tensor"),
        (([(3, torch.zeros(3))],), {}, r"the pair \(3, a Tensor\)"),
        (([torch.zeros(3)],), {}, r"named_params has Tensor"),
        (([("w", torch.zeros(3).to_sparse())],), {}, "'w' has no plain memory"),
        (([("w", torch.zeros(3, dtype=torch.int8))],), {}, "'w' is torch.int8"),
        (([("w", torch.zeros(3)), ("w", torch.ones(3))],), {}, "two tensors are named 'w'"),
        (([("w", torch.zeros(3))], 7), {}, "optimizer is a int; give a factory"),
        (([("w", torch.zeros(3))], lambda params: None), {}, "factory returned a NoneType"),
        (
            ([("w", torch.zeros(3))], lambda params: 1 / 0),
            {},
            "rank 0: .* factory raised ZeroDivisionError",
        ),
        (([("w", torch.zeros(3))],), {"max_grad_norm": float("nan")}, "max_grad_norm is nan; give a number above 0"),
        (([("w", torch.zeros(3))],), {"max_grad_norm": -1}, "max_grad_norm is -1"),
        (([("w", torch.zeros(3))],), {"consistency": float("nan")}, "unknown consistency nan"),
        (([("w", torch.zeros(3))],), {"consistency": None}, "unknown consistency None"),
        (([("w", torch.zeros(3))],), {"servers": 1.0}, "servers is 1.0"),
        (([("w", torch.zeros(3))],), {"groups": {"w": "first"}}, "the group of 'w' is 'first'"),
    ],
)
def test_arguments_of_a_store_that_can_not_be(arguments: Any, options: dict[str, Any], reason: str) -> None:
    """B19: one clear UsageError each."""
    with pytest.raises(UsageError, match=reason):
        ParameterServer(*arguments, group=alone(), **options)


def test_what_one_rank_refuses_is_told_to_all() -> None:
    """B19: nobody waits for a rank whose arguments were refused, or whose factory raised, be it the server's alone."""

    def on_rank(rank: int, factory: Any, values: Any) -> str:
        with pytest.raises(UsageError) as caught:
            ParameterServer(values, factory, group=everyone[rank])
        return str(caught.value)

    from crew import Crew

    crew = Crew(3)
    everyone = groups(3)
    good = [("w", torch.zeros(3))]
    texts = crew.all(lambda rank: on_rank(rank, sgd, [(7, torch.zeros(3))] if rank == 1 else good))
    assert all("the pair (7, a Tensor)" in text and "(on ranks 1 of 3)" in text for text in texts), texts

    def breaks(params: Any) -> torch.optim.Optimizer:
        if params[0].numel() == 3:
            raise KeyError("no such layer")
        return sgd(params)

    texts = crew.all(lambda rank: on_rank(rank, breaks, good))
    assert all("server 0 (rank 2): the optimizer's factory raised KeyError: 'no such layer'" in text for text in texts)
    crew.close()


def test_workers_are_told_what_a_server_raises() -> None:
    """B19: an optimizer that raises on the server alone, in mid-training."""
    told: list[str] = []

    class Breaks(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if self.param_groups[0]["lr"] == 0.25:
                raise ValueError("no such learning rate")
            return super().step(closure)

    def script(store: ParameterServer, worker: int) -> None:
        assert store.optimizer is not None
        out = torch.empty(3)
        for step in range(3):
            if step == 2:
                store.optimizer.param_groups[0]["lr"] = 0.25
            try:
                store.push_pull("w", torch.ones(3), out).wait()
                store.step()
            except CommlabError as error:
                told.append(str(error))
                assert step == 2
        with pytest.raises(CommlabError, match="has failed"):
            store.push("w", torch.ones(3))

    with pytest.raises(ValueError, match="no such learning rate"):
        play(3, script, [("w", torch.zeros(3))], lambda params: Breaks(params, lr=0.5), elementwise=True)
    wanted = "server 0 (server rank 2) has failed: ValueError: no such learning rate; this store can't be used any more"
    assert len(told) == 2 and all(wanted in text for text in told), told


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


def test_a_refused_push_that_nobody_waited_for_is_not_forgotten() -> None:
    """A gradient that was refused is told to who calls the step after."""
    store = ParameterServer([("w", torch.zeros(3))], None, group=alone())
    store.push("w", torch.ones(3))
    twice = store.push("w", torch.ones(3))
    store.step()
    while not twice.done():
        pass
    with pytest.raises(UsageError, match=r"push of 'w' at clock 0 was refused by server 0: .*twice in clock 0"):
        store.step()
    store.step()
    store.close()


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


def test_a_shard_has_its_slices_side_by_side() -> None:
    store = ParameterServer(named(23), sgd, group=alone())
    assert isinstance(store.server and store.server.ledger.shard, Shard)
    shard = store.server.ledger.shard  # type: ignore[union-attr]
    for span in shard.spans(index for index in range(len(shard.slices)) if index % 5):
        assert span.where.numel == sum(shard.slices[index].numel for index in span.indices)
        assert {shard.dtypes[index] for index in span.indices} == {span.dtype}
    store.close()
