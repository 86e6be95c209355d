"""Which tensors a collective takes, asked of tensors alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import commlab
from commlab.collectives import tensors
from commlab.errors import UsageError
from commlab.job.topology import Topology
from commlab.runtime.group import Group
from commlab.transport.sim import SimNetwork


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [
        ((6,), (1,), False),
        ((3, 2), (2, 1), False),
        ((3, 2), (1, 3), False),
        ((3, 2), (1, 1), True),
        ((4,), (0,), True),
        ((1, 4), (0, 1), False),
        ((2, 3), (3, 2), False),
        ((3, 3), (3, 2), False),
        ((4, 4), (3, 2), True),
        ((0, 4), (0, 0), False),
        ((2, 2, 2), (1, 2, 3), True),
    ],
)
def test_overlapping_strides(shape: tuple[int, ...], strides: tuple[int, ...], overlaps: bool) -> None:
    """B18: exactly the tensors of which two numbers lie at one place; strides that interlock are looked through."""
    tensor = torch.zeros(100).as_strided(shape, strides)
    places = [sum(i * s for i, s in zip(at, strides, strict=True)) for at in np.ndindex(*shape)]
    assert overlaps == (len(set(places)) < len(places))
    if overlaps:
        with pytest.raises(UsageError, match=r"share one place in memory"):
            tensors.writable(tensor, "here")
    else:
        assert tensors.writable(tensor, "here").data_ptr() == tensor.data_ptr()
    assert tensors.readable(tensor, "here").shape == tensor.shape


@pytest.mark.filterwarnings("ignore")
def test_memory_that_may_only_be_read(tmp_path: Path) -> None:
    """B18: a write there would end the process; a copy-on-write map and one opened for writing are memory."""
    file = tmp_path / "numbers"
    file.write_bytes(bytes(8192))
    for mode in ("r", "c", "r+"):
        tensor = torch.from_numpy(np.memmap(file, mode=mode, dtype=np.float32))
        tensors.readable(tensor, "here")
        if mode == "r":
            with pytest.raises(UsageError, match=r"here: its memory may only be read"):
                tensors.writable(tensor[5:], "here")
        else:
            tensors.writable(tensor[5:], "here")


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_numbers_of_their_own() -> None:
    """B18: refused by name, also in a group of one rank."""
    group = Group(SimNetwork(1).transports()[0], Topology(((0,),)))
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for tensor, words in (
        ([1.0], "a list: that is no tensor"),
        (torch.eye(3).to_sparse_csr(), "sparse_csr tensor is not one dense block"),
        (jagged, "nested tensor is not one dense block"),
        (torch.zeros(3, device="meta"), "device meta"),
        (torch.nn.parameter.UninitializedBuffer(), "has no numbers yet"),
    ):
        for call in (
            lambda tensor=tensor: commlab.allreduce(tensor, group=group),
            lambda tensor=tensor: commlab.broadcast(tensor, group=group),
            lambda tensor=tensor: commlab.allreduce_async(tensor, group=group),
        ):
            with pytest.raises(UsageError, match=words):
                call()

    def inside(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(UsageError, match=r"can't be reached|stands for other"):
            commlab.allreduce(x, group=group)
        return x

    torch.vmap(inside)(torch.zeros(2, 3))
    with pytest.raises(UsageError, match=r"group must be a commlab\.Group"):
        commlab.allreduce(torch.zeros(2), group="all")  # type: ignore[arg-type]


def test_a_process_forgets_no_pages_for_ever() -> None:
    """What was found to be writable is asked again now and then, because memory comes and goes."""
    page = 1 << tensors.PAGE_BITS
    big = torch.zeros(2000 * page // 4)
    assert all(tensors.may_write_at(big.data_ptr() + at * page) for at in range(2000))
    assert len(tensors.writable_pages) <= 1025
