"""Tensors of every dtype and kind that torch has: moved bit for bit, and reduced rightly whatever their views mean."""

from __future__ import annotations

import itertools

import pytest
import torch
from closed_form import expected, numbers
from mpi_groups import all_groups
from mpi_ranks import Ranks

import commlab
from commlab.chunks import split
from commlab.collectives.tensors import as_bytes

NAMES = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex32",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    "bits8",
    "bits16",
)
DTYPES = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]


def noise(seed: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes of every value, as numbers of ``dtype``."""
    size_bytes = numel * dtype.itemsize
    drawn = torch.randint(
        0, 2 if dtype is torch.bool else 256, (size_bytes,), dtype=torch.uint8, generator=seeded(seed)
    )
    return drawn.view(dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_move_whatever_they_mean(ranks: Ranks, dtype: torch.dtype) -> None:
    """B22: broadcast and allgather, through the window and in messages, bit for bit; NaNs keep their payload."""
    for group, numel in itertools.product(all_groups(ranks), (0, 1, 7, 5003)):
        root = group.size - 1
        mine = noise(group.rank, numel, dtype)
        assert commlab.broadcast(mine, root, group=group) is mine
        assert torch.equal(as_bytes(mine), as_bytes(noise(root, numel, dtype)))
        chunks = split(numel, group.size)
        whole = noise(99, numel, dtype)
        commlab.allgather(whole, noise(group.rank, chunks[group.rank].numel, dtype), group=group)
        parts = [as_bytes(noise(rank, chunk.numel, dtype)) for rank, chunk in enumerate(chunks)]
        assert torch.equal(as_bytes(whole), torch.cat(parts))


def test_numbers_in_the_window_of_every_size(ranks: Ranks) -> None:
    """B22: tensors that lie in the window, and strided ones, which are staged."""
    group = ranks.world
    for dtype in (torch.bool, torch.int16, torch.complex64, torch.complex128):
        shared = commlab.empty(5003, dtype, group)
        shared.copy_(noise(group.rank, 5003, dtype))
        commlab.broadcast(shared, group.size - 1, group=group)
        assert torch.equal(as_bytes(shared), as_bytes(noise(group.size - 1, 5003, dtype)))
        strided = noise(group.rank, 1200, dtype).view(30, 40).t()
        commlab.broadcast(strided, 0, group=group)
        assert torch.equal(as_bytes(strided.t()), as_bytes(noise(0, 1200, dtype)))


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors(ranks: Ranks) -> None:
    """B22: the bytes of quantized tensors move where scales and zero points are equal, and nowhere else."""
    group = ranks.world
    for dtype in (torch.quint8, torch.qint8, torch.qint32):
        mine = torch.quantize_per_tensor(numbers(group.rank, 30, torch.float32), 0.5, 3, dtype)
        commlab.broadcast(mine, 0, group=group)
        want = torch.quantize_per_tensor(numbers(0, 30, torch.float32), 0.5, 3, dtype)
        assert torch.equal(mine.int_repr(), want.int_repr())
    if group.size > 1:
        scale = 0.5 if group.rank else 0.25
        with pytest.raises(commlab.DisagreementError, match=r"rank 0: .*scale 0\.25"):
            commlab.broadcast(torch.quantize_per_tensor(torch.ones(3), scale, 0, torch.quint8), group=group)


@pytest.mark.mpi(min_size=2)
def test_equal_sizes_of_other_dtypes_disagree(ranks: Ranks) -> None:
    """B22: float8 is not int8, though both are bytes."""
    dtype = torch.int8 if ranks.world.rank else torch.bool
    with pytest.raises(commlab.DisagreementError, match=r"rank 0: .*bytes of bool"):
        commlab.broadcast(torch.zeros(8, dtype=dtype), group=ranks.world)


def test_views_that_negate_or_conjugate(ranks: Ranks) -> None:
    """B18: ``conj().imag`` negates its memory; the reduction is of what the view says, and so is what is written."""
    for group in all_groups(ranks):
        for numel in (1, 6, 30_000):
            for op in ("max", "min", "sum"):
                whole = torch.complex(numbers(0, numel, torch.float32), numbers(group.rank, numel, torch.float32))
                view = whole.conj().imag
                assert view.is_neg()
                given = torch.stack([-numbers(rank, numel, torch.float32) for rank in range(group.size)])
                want = {"max": given.amax(0), "min": given.amin(0), "sum": given.sum(0)}[op]
                assert torch.equal(commlab.allreduce(view, op, group=group), want)
                assert torch.equal(whole.imag, -want)
                assert torch.equal(whole.real, numbers(0, numel, torch.float32))
            given_away = torch.complex(numbers(group.rank, numel, torch.float32), torch.ones(numel)).conj()
            commlab.broadcast(given_away, group.size - 1, group=group)
            root = torch.complex(numbers(group.size - 1, numel, torch.float32), -torch.ones(numel))
            assert torch.equal(given_away.resolve_conj(), root)


class Labelled(torch.Tensor):
    """A subclass that is memory like any other."""


def test_subclasses_inference_and_gradients(ranks: Ranks) -> None:
    """B18: subclasses with memory of their own, tensors of inference mode, leaves, and what autograd has saved."""
    group = ranks.world
    total = float(group.size * (group.size + 1) // 2)
    for numel in (1, 3, 30_000):
        ones = torch.full((numel,), group.rank + 1.0)
        labelled = ones.clone().as_subclass(Labelled)
        assert commlab.allreduce(labelled, "sum", group=group) is labelled
        assert (labelled.as_subclass(torch.Tensor) == total).all()
        with torch.inference_mode():
            inferred = ones.clone()
        strided = inferred.view(-1, 1)
        commlab.allreduce(strided, "sum", group=group)
        assert (inferred == total).all()
        leaf = torch.nn.Parameter(ones.clone())
        commlab.allreduce(leaf, "sum", group=group)
        assert leaf.is_leaf
        assert (leaf == total).all()
        saved = torch.nn.Parameter(ones.clone())
        activation = (saved * 2).exp()
        loss = activation.square().sum()
        commlab.allreduce(activation, group=group)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("context", [torch.device("meta"), torch.float64], ids=str)
def test_defaults_of_the_program_are_not_ours(ranks: Ranks, context: torch.device | torch.dtype) -> None:
    """B24: a default device or dtype around collectives changes nothing: our buffers name theirs."""
    group_of = (ranks.world, ranks.halves(ranks.size // 2))
    made = {
        (group.size, numel, dtype): numbers(group.rank, numel, dtype)
        for group in group_of
        for numel in (9, 40_000)
        for dtype in (torch.float32, torch.bfloat16)
    }
    want = {key: expected("sum", *key) for key in made}
    default = torch.get_default_dtype()
    if isinstance(context, torch.device):
        torch.set_default_device(context)
    else:
        torch.set_default_dtype(context)
    try:
        for group in group_of:
            for numel, dtype, algorithm in itertools.product(
                (9, 40_000), (torch.float32, torch.bfloat16), ("auto", "ring", "direct")
            ):
                given = made[group.size, numel, dtype].clone()
                commlab.allreduce(given, "sum", algorithm=algorithm, group=group)
                if dtype is torch.float32 or group.size <= 4:
                    assert torch.equal(given, want[group.size, numel, dtype]), (group.size, numel, dtype, algorithm)
                part = given.clone()[: split(numel, group.size)[group.rank].numel]
                commlab.reduce_scatter(part, given, "sum", group=group)
                commlab.allgather(given, part, group=group)
                commlab.reduce(given, 0, "max", group=group)
                commlab.broadcast(given.t(), group.size - 1, group=group)
                commlab.allreduce(given.float(), wire="bf16", group=group)
                rows = made[group.size, numel, dtype][: 3 + group.rank]
                parts = commlab.allgather_parts(rows.t(), group=group)
                objects = commlab.allgather_object({"rows": rows}, group=group)
                assert torch.equal(parts[group.rank], rows)
                assert [part.numel() for part in parts] == [min(numel, 3 + peer) for peer in range(group.size)]
                assert all(map(torch.equal, parts, [each["rows"] for each in objects]))
                whole = made[group.size, numel, dtype].clone()
                commlab.alltoall(whole[: group.size], whole[-group.size :].clone(), group=group)
                commlab.gather([part.clone() for part in parts], rows, group=group)
            made_in_window = commlab.empty(8, group=group)
            assert made_in_window.device.type == "cpu"
            made_group = group.subgroup(range(group.size))
            assert made_group is not None
            made_group.barrier()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(default)
