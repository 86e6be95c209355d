"""``ParameterServer`` by itself, on real transports: consistency, tensors of every kind, and what is refused."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from mpi_ranks import Ranks
from mpi_stores import closing_stores

import commlab
from commlab.errors import DisagreementError, UsageError
from commlab.ps.store import ParameterServer
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group


def store(group: Group, consistency: str, servers: int = 1, **options: Any) -> ParameterServer:
    """Two keys; a push of ones takes 1 away from every number."""
    tensors = {"layer.weight": torch.arange(3000.0).view(30, 100), "layer.bias": torch.zeros(3)}
    options.setdefault("optimizer", lambda params: torch.optim.SGD(params, lr=1.0))
    return commlab.ParameterServer(tensors.items(), consistency=consistency, servers=servers, group=group, **options)


@closing_stores
def test_ssp_never_runs_further_ahead_and_asp_does(ranks: Ranks) -> None:
    """One worker is slow: what the others read is bounded by the consistency, and recorded."""
    found = {}
    for consistency in ("bsp", "ssp:0", "ssp:2", "asp"):
        made = store(ranks.world, consistency, servers=2)
        if made.role == "server":
            continue
        me, out, steps = made.group.rank, torch.empty(3), 8
        for _ in range(steps):
            made.pull("layer.bias", out).wait()
            if me == 0:
                # Under asp it does nothing at all until the others have made all their steps.
                time.sleep(0.02) if consistency != "asp" or made.clock else made.group.barrier()
            made.push("layer.bias", torch.ones(3)).wait()
            made.step()
        if me:
            made.leave()
            if consistency == "asp":
                made.group.barrier()
        made.group.barrier()
        made.pull("layer.bias", out).wait()
        updates = steps if consistency == "bsp" else steps * made.group.size
        assert (out == -updates).all() and made.version("layer.bias") == 1 + updates, (consistency, out)
        if me == 0:
            found[consistency] = max(made.report()["staleness"])
        made.group.barrier()
        made.close()
    if found:
        assert found["bsp"] == found["ssp:0"] == 0 and found["ssp:2"] <= 2 < found["asp"] == 7, found


@closing_stores
def test_push_pull_and_every_kind_of_tensor(ranks: Ranks) -> None:
    made = store(ranks.world, "bsp", servers=3, optimizer=None)
    if made.role == "worker":
        out = torch.empty(100, 30).t()
        assert made.push_pull("layer.weight", torch.ones(100, 30).t(), out).wait() is out
        assert torch.equal(out, torch.arange(3000.0).view(30, 100) + 1), "the mean of ones was added"
        with pytest.raises(UsageError, match=r"no key 'layer.wieght'; did you mean 'layer.weight', 'layer.bias'\?"):
            made.push("layer.wieght", out)
        with pytest.raises(UsageError, match=r"push of 'layer.bias' with a tensor of float32\[4\].* has float32\[3\]"):
            made.push("layer.bias", torch.ones(4))
        with pytest.raises(UsageError, match=r"pull of 'layer.bias' with a tensor of float64\[3\]"):
            made.pull("layer.bias", torch.ones(3, dtype=torch.float64))
        with pytest.raises(UsageError, match=r"push of 'layer.weight' .*twice in clock 0"):
            made.push("layer.weight", out).wait()
        made.step().wait()
        made.pull("layer.weight", out).wait()
        assert float(out.sum()) == sum(range(3000)) + 3000, "and the servers lost nothing"
        made.close()
        with pytest.raises(UsageError, match=r"step\(\) on a parameter server that was closed"):
            made.step()
    else:
        with pytest.raises(UsageError, match=r"push\(\) is for workers, and this rank was a server"):
            made.push("layer.bias", torch.ones(3))


@closing_stores
def test_arguments_that_can_not_be(ranks: Ranks) -> None:
    world = ranks.world
    for servers in (0, ranks.size, ranks.size + 1):
        with pytest.raises(UsageError, match=rf"{servers} servers among {ranks.size} ranks"):
            store(world, "bsp", servers=servers)
    with pytest.raises(UsageError, match="optimizer Adafactor may need whole tensors"):
        store(world, "asp", optimizer=torch.optim.Adafactor)
    with pytest.raises(UsageError, match=r"max_grad_norm 1.0 needs all workers' gradients.*under asp.*or use bsp"):
        store(world, "asp", max_grad_norm=1.0)
    with pytest.raises(DisagreementError, match=r"here asp, .*; there ssp:1|here ssp:1, .*; there asp"):
        store(world, "asp" if world.rank == ranks.size - 3 else "ssp:1")
    with pytest.raises(DisagreementError, match=r"rank \d and rank \d make different"):
        commlab.ParameterServer([("a", torch.ones(2 + (world.rank == 3)))], group=world)
    made = store(world, "bsp")
    if made.role == "worker":
        made.close()


@closing_stores
def test_a_tied_tensor_is_one(ranks: Ranks) -> None:
    group = ranks.group(0, 1)
    if group is not None:
        shared = torch.ones(4)
        made = commlab.ParameterServer([("in", shared), ("out", shared)], group=group)
        assert made.placement.bytes_per_server == [16] and made.keys == ("in", "out")
        if made.role == "worker":
            out = torch.empty(4)
            assert (made.push_pull("in", torch.ones(4), out).wait() == 2).all()
            assert (made.pull("out", out).wait() == 2).all()
            made.close()


@closing_stores
def test_workers_that_return_without_a_word_are_waited_for_by_shutdown(ranks: Ranks) -> None:
    """``commlab.shutdown()`` closes what was left open."""
    group = ranks.subgroup(range(4))
    if group is not None:
        made = store(group, "asp")
        if made.role == "worker":
            made.push("layer.bias", torch.ones(3)).wait()
        group.close()
        if made.role == "worker":
            with pytest.raises(UsageError, match="was closed"):
                made.step()


@closing_stores
def test_a_refused_push_is_heard_of_in_push_pull(ranks: Ranks) -> None:
    """Two workers whose learning rates differ: the second is refused, and must not go on as if it had pushed."""
    group = ranks.group(0, 1, 2)
    if group is not None:
        store = ParameterServer(
            [("w", torch.zeros(5))], lambda tensors: torch.optim.SGD(tensors, lr=0.1 + group.rank), group=group
        )
        if store.role == "worker":
            assert store.optimizer is not None
            out, refused = torch.zeros(5), b""
            if store.group.rank == 0:
                store.push("w", torch.ones(5)).wait()
            store.group.barrier()
            if store.group.rank == 1:
                handle = store.push_pull("w", torch.ones(5), out)
                store.step()
                with pytest.raises(
                    UsageError, match=r"push of 'w' at clock 0 was refused by server 0: .*lr=0\.1 in group"
                ):
                    handle.wait()
                refused = b"refused"
            else:
                store.step()
                store.pull("w", out).wait()
            assert gather_bytes(store.group, refused, "who was refused") == [b"", b"refused"]
            store.close()
