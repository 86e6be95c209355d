"""Every reduction of torch.distributed in every dtype and form, those included that are left to gloo, against torch on
one rank; and what is refused, which ends no group."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import reduce
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Forked

from commlab.c10d.fallback import leave, make_gloo, refusal_of
from commlab.errors import AgreedError, CommlabError, DisagreementError

OPS = ("SUM", "PRODUCT", "MIN", "MAX", "AVG", "BAND", "BOR", "BXOR")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex64, torch.complex128)
DTYPES = (*INTEGERS, *FLOATS, *COMPLEX, torch.bool)
LEFT = tuple(dtype for dtype in INTEGERS if dtype is not torch.int16)
"""The integers whose bitwise reductions gloo has."""
FORMS = ("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor")


def numbers(rank: int, dtype: torch.dtype, shape: tuple[int, ...], first: int = 0) -> torch.Tensor:
    """Distinct for each rank and index, and so small that every reduction of a few ranks is exact in every dtype."""
    count = torch.Size(shape).numel()
    found = (torch.arange(count, device="cpu").double() * 5 + 3 * rank + first) % 4
    if dtype is torch.bool:
        return (found > 1 + rank % 2).view(shape)
    if dtype.is_complex:
        return torch.complex(found, 1 - found).to(dtype).view(shape)
    return found.to(dtype).view(shape)


def answer(op: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The reduction of ``parts`` by torch, on one rank."""
    dtype = parts[0].dtype
    if op in ("BAND", "BOR", "BXOR"):
        return reduce({"BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor}[op], parts)
    exact = torch.stack(parts).to(torch.complex128 if dtype.is_complex else torch.float64)
    if op in ("SUM", "AVG"):
        total = exact.sum(0)
        # A division of complex numbers rounds otherwise than one of their parts.
        mean = torch.view_as_complex(torch.view_as_real(total) / len(parts)) if dtype.is_complex else total / len(parts)
        wanted = total if op == "SUM" else mean if dtype.is_complex or dtype.is_floating_point else mean.trunc()
    else:
        wanted = {"PRODUCT": exact.prod, "MIN": exact.amin, "MAX": exact.amax}[op](0)
    return wanted != 0 if dtype is torch.bool else wanted.to(dtype)


def taken(op: str, dtype: torch.dtype) -> bool:
    """Whether torch.distributed has this reduction."""
    if op in ("BAND", "BOR", "BXOR"):
        return dtype in LEFT or dtype is torch.bool
    if dtype.is_complex:
        return op in ("SUM", "AVG")
    return dtype is not torch.bool or op != "AVG"


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def require(found: torch.Tensor, wanted: torch.Tensor, hops: int, where: object) -> None:
    """``hops``: 0 where 16-bit numbers are rounded once; else each rank's part of their mean is rounded when it leaves,
    and their sum at each hop."""
    if hops and "AVG" in str(where) and found.dtype in (torch.float16, torch.bfloat16):
        error = (found.double() - wanted.double()).abs()
        assert (error <= hops * torch.finfo(found.dtype).eps * wanted.double().abs()).all(), (where, found, wanted)
    else:
        assert torch.equal(found, wanted), (where, found, wanted)


def done(
    form: str, op: str, dtype: torch.dtype, shape: tuple[int, ...], rank: int, size: int, layout: Any, hops: int
) -> None:
    """One reduction, and whether it is right."""
    torch_op, where = getattr(dist.ReduceOp, op), (form, op, dtype, shape)
    if form.startswith("reduce_scatter"):
        parts = [[numbers(peer, dtype, shape, at) for at in range(size)] for peer in range(size)]
        out = layout(torch.zeros(shape, dtype=dtype))
        if form == "reduce_scatter":
            dist.reduce_scatter(out, [layout(part) for part in parts[rank]], torch_op)
        else:
            dist.reduce_scatter_tensor(out, torch.cat(parts[rank]), torch_op)
        require(out, answer(op, [each[rank] for each in parts]), hops, where)
        return
    own, wanted = layout(numbers(rank, dtype, shape)), answer(op, [numbers(peer, dtype, shape) for peer in range(size)])
    if form == "all_reduce_coalesced":
        other = layout(numbers(rank, dtype, shape, 1))
        dist.all_reduce_coalesced([own, other], torch_op)
        require(other, answer(op, [numbers(peer, dtype, shape, 1) for peer in range(size)]), hops, where)
    elif form == "reduce":
        dist.reduce(own, size - 1, torch_op)
    else:
        dist.all_reduce(own, torch_op)
    if form != "reduce" or rank == size - 1:
        require(own, wanted, hops, where)


def all_of_them(rank: int, size: int, hops: int = 0) -> int:
    checked = 0
    for form in FORMS:
        for op in OPS:
            for dtype in DTYPES:
                if taken(op, dtype):
                    shape = ((7,), (3, 5), (0,), (1, 257))[checked % 4]
                    done(form, op, dtype, shape, rank, size, strided if checked % 3 == 1 else torch.clone, hops)
                    checked += 1
    return checked


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_reduction(forked: Forked, size: int) -> None:
    count = sum(taken(op, dtype) for op in OPS for dtype in DTYPES) * len(FORMS)
    assert forked(all_of_them, size, limit_s=100) == [count] * size


@pytest.mark.parametrize("environ", [{"COMMLAB_WINDOW": "off"}, {"COMMLAB_NODES": "2"}], ids=["no-window", "two-nodes"])
def test_every_reduction_without_a_common_window(forked: Forked, environ: dict[str, str]) -> None:
    forked(all_of_them, 3, environ=environ, limit_s=100, arguments=(3,))


def refused(rank: int, size: int) -> None:
    for op in OPS:
        for dtype in DTYPES:
            if taken(op, dtype):
                continue
            torch_op = getattr(dist.ReduceOp, op)
            for form in (dist.all_reduce, dist.reduce_scatter_tensor, dist.reduce):
                own = numbers(rank, dtype, (size,))
                arguments = [own[:1].clone(), own] if form is dist.reduce_scatter_tensor else [own]
                arguments += [0] if form is dist.reduce else []
                with pytest.raises((AgreedError, ValueError)):
                    form(*arguments, torch_op)
    # torch itself refuses complex tensors before any backend is asked.
    with pytest.raises(AgreedError, match=rf"rank {rank}: Cannot use ReduceOp.BXOR with dtype float16 on the CPU"):
        dist.all_reduce(torch.ones(3, dtype=torch.float16), dist.ReduceOp.BXOR)
    with pytest.raises(AgreedError, match=rf"rank {rank}: broadcast by gloo: "):
        dist.broadcast(torch.ones(3).to_sparse(), 0)
    dist.all_reduce(after := torch.full((3,), rank + 1.0))
    assert after.tolist() == [size * (size + 1) / 2] * 3
    dist.all_reduce(bits := torch.tensor([1 << rank]), dist.ReduceOp.BOR)
    assert bits.tolist() == [2**size - 1]


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_refused_ends_no_group(forked: Forked, size: int) -> None:
    forked(refused, size)


def what_gloo_has(rank: int, size: int) -> None:
    gloo = make_gloo(dist.HashStore(), 0, 1, timedelta(seconds=20))
    for op in OPS:
        for dtype in (*INTEGERS, *FLOATS, torch.bool, torch.uint16, torch.float8_e5m2):
            asked = dist.AllreduceOptions()
            asked.reduceOp = getattr(dist.ReduceOp, op)
            try:
                gloo.allreduce([torch.ones(1).to(dtype)], asked).wait()
                refused = False
            except RuntimeError:
                refused = True
            assert bool(refusal_of(asked.reduceOp, dtype)) == refused, (op, dtype)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="where gloo refuses, that of torch 2.6 may hang"
)
def test_what_gloo_has_is_known(forked: Forked) -> None:
    forked(what_gloo_has, 1)


def not_alike(rank: int, size: int) -> None:
    both = r"(?s)BAND.*BOR|BOR.*BAND"
    with pytest.raises(DisagreementError, match=both):
        dist.all_reduce(torch.ones(4, dtype=torch.int32), dist.ReduceOp.BAND if rank else dist.ReduceOp.BOR)
    with pytest.raises(DisagreementError, match=r"int32\[4\]"):
        dist.all_reduce(torch.ones(4 + (rank == 1), dtype=torch.int32), dist.ReduceOp.BAND)
    dist.all_reduce(after := torch.full((3,), rank + 1.0))
    assert after.tolist() == [size * (size + 1) / 2] * 3


def test_ranks_with_other_operators_or_sizes_disagree(forked: Forked) -> None:
    forked(not_alike, 3)


def begun_by_some(rank: int, size: int) -> str:
    group: Any = dist.group.WORLD
    gloo, own = group._gloo(), torch.ones(2)

    def start() -> Any:
        if rank == 1:
            raise MemoryError("no room")
        return gloo.allreduce([own])

    handle = leave(group.group, "allreduce", own, "", [own], start)
    with pytest.raises(CommlabError) as caught:
        handle.wait(20)
    return str(caught.value)


def test_what_gloo_refuses_on_one_rank_is_said_on_all(forked: Forked) -> None:
    for rank, text in enumerate(forked(begun_by_some, 3)):
        assert re.match(rf"rank {rank}: allreduce by gloo is refused on some ranks only: .*rank 1: no room", text), text
