"""Peers that cannot take part say why."""

from __future__ import annotations

import sys

import pytest
import torch

from bench.contestants import PEERS
from bench.contestants.case import Case
from bench.core.harness import measure
from bench.core.ranks import Ranks


def test_peers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    case = Case("allreduce", 8, torch.float32, 0, 1)
    assert "make horovod" in measure(PEERS["horovod"](case), Ranks(), 1)[0].missing
    assert "mpirun" in measure(PEERS["mpi"](case), Ranks(), 1)[0].missing
    other = Case("allgather", 8, torch.float32, 0, 1)
    assert "allreduce only" in measure(PEERS["horovod"](other), Ranks(), 1)[0].missing
