"""The operations that bench.c10d times: what is told to be right is right, and nothing else."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from forked import Forked

from bench.contestants.torch_operations import OPERATIONS, operation


def each(rank: int, size: int) -> None:
    for size_bytes in (4, 24, 4000):
        for name in OPERATIONS:
            made = operation(name, size_bytes, dist.group.WORLD, rank, size)
            if rank == 0 and name not in ("barrier", "broadcast"):
                assert made.wrong(), f"{name} is right before it is called"
            made.call()
            assert made.wrong() == 0, (name, size_bytes)
            assert made.size_bytes >= size_bytes // 4 // size * size * 4 or name == "barrier"
            for _ in range(3):
                operation(name, size_bytes, dist.group.WORLD, rank, size, zeros=True).call()


@pytest.mark.parametrize("size", [2, 3])
def test_right_after_one_call_alone(forked: Forked, size: int) -> None:
    forked(each, size)
