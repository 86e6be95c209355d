"""The group of all ranks where there is only one, and what ``init`` refuses."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
import torch

import commlab
from commlab.errors import UsageError
from commlab.job import launch
from commlab.runtime import world

LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "SLURM_PROCID",
)


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for home, name in ((sys, "excepthook"), (threading, "excepthook"), (launch, "_abort"), (world, "_world")):
        monkeypatch.setattr(home, name, getattr(home, name))
    yield
    commlab.shutdown()


def test_without_a_launcher_there_is_a_group_of_one() -> None:
    for seconds in (0, float("nan"), float("inf"), 1e10):
        with pytest.raises(UsageError, match=r"give a number of seconds above 0, 1e\+09 \(30 years\) at most"):
            commlab.init("mpi", timeout_s=seconds)
    group = commlab.init()
    assert (group.rank, group.size, group.local_rank, group.local_size, group.nodes) == (0, 1, 0, 1, ((0,),))
    assert commlab.init() is group
    assert commlab.init("mpi", timeout_s=300) is group
    with pytest.raises(UsageError, match="called before with transport='mpi', and now with transport='torch'; call"):
        commlab.init("torch")
    values = torch.tensor([1.0, 2.0])
    assert commlab.allreduce(values) is values
    commlab.barrier()
    commlab.shutdown()
    commlab.shutdown()
    with pytest.raises(UsageError, match=r"call commlab\.init\(\) first"):
        commlab.allreduce(values)
    again = commlab.init()
    assert again is not group
    assert torch.equal(commlab.broadcast(values), torch.tensor([1.0, 2.0]))


def test_unknown_transport() -> None:
    with pytest.raises(UsageError, match="unknown transport 'nccl'; there are mpi, torch"):
        commlab.init("nccl")


def test_mpi_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"rank 1: torchrun launched this job.*use transport 'torch'"):
        commlab.init("mpi")
