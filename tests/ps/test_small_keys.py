"""Stores of several ranks in one process: many keys in few messages, and side by side in a server's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from sim_stores import play, sgd
from training import alone

from commlab.ps.server.shard import Shard
from commlab.ps.store import ParameterServer

KEYS = 1203

SHAPES = [(), (3,), (2, 5), (0, 4), (17,)]


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


def test_a_shard_has_its_slices_side_by_side() -> None:
    store = ParameterServer(named(23), sgd, group=alone())
    assert isinstance(store.server and store.server.ledger.shard, Shard)
    shard = store.server.ledger.shard  # type: ignore[union-attr]
    for span in shard.spans(index for index in range(len(shard.slices)) if index % 5):
        assert span.where.numel == sum(shard.slices[index].numel for index in span.indices)
        assert {shard.dtypes[index] for index in span.indices} == {span.dtype}
    store.close()
