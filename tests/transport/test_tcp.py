"""Links: programs give the bits of the Python executor, for every algorithm, number of ranks, dtype, op and wire."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from closed_form import DTYPES, ops_for, same_bits
from linked import Mesh, wait_for
from simulated import simulate

from commlab.chunks import EMPTY, Range, split, whole_at
from commlab.collectives.plan import divided
from commlab.runtime import programs
from commlab.runtime.operand import operand_of
from commlab.schedules import ALGORITHMS, compose
from commlab.schedules.step import Schedule
from commlab.transport.tcp import missing_reason

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())
algorithms = pytest.mark.parametrize("name", ALGORITHMS)


@pytest.fixture(scope="module")
def mesh_of() -> Iterator[object]:
    """One mesh for each number of ranks, kept for all tests that leave it whole."""
    made = lru_cache(maxsize=None)(Mesh)
    yield made


def noise(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers whose sums round, so that another order of adding gives other bits."""
    generator = torch.Generator().manual_seed(100 * rank + numel)
    if not dtype.is_floating_point:
        return torch.randint(-(2**31), 2**31 - 1, (numel,), generator=generator).to(dtype)
    return (torch.randn(numel, generator=generator, dtype=torch.float64) * 10 ** (rank % 3)).to(dtype)


def run_all(
    mesh: Mesh,
    kind: str,
    name: str,
    data: list[torch.Tensor],
    op: str,
    chunks: tuple[Range, ...],
    segment_numel: int = 32,
) -> None:
    """The operation on all ranks of the mesh, as programs, without an announcement."""
    size, numel, algorithm = mesh.size, data[0].numel(), ALGORITHMS[name]
    divisor, reduction = divided(op, size)
    launched = []
    for rank, (transport, flat) in enumerate(zip(mesh.transports, data, strict=True)):
        operand = programs.native_operand(flat, "sum", 1, False, EMPTY)
        if kind != "allgather":
            operand = programs.native_operand(flat, reduction, divisor, algorithm.MEETS_AT_OWNER, chunks[rank])
        launch = programs.program_launch(
            transport, (name, kind, chunks), lambda rank=rank: schedule_of(kind, name, rank, size, numel, chunks),
            flat, operand, segment_numel * flat.element_size(),
        )  # fmt: skip
        launched.append((transport.launch(b"", launch), launch))
    for request, _ in launched:
        wait_for(request)


def schedule_of(kind: str, name: str, rank: int, size: int, numel: int, chunks: tuple[Range, ...]) -> Schedule:
    algorithm = ALGORITHMS[name]
    if kind == "allreduce":
        return compose.allreduce(algorithm, rank, size, numel)
    return (compose.reduce_scatter if kind == "reduce_scatter" else compose.allgather)(algorithm, rank, chunks)


def run_reference(kind: str, name: str, data: list[torch.Tensor], op: str, chunks: tuple[Range, ...]) -> None:
    """The same in place by the Python executor."""
    size, numel, algorithm = len(data), data[0].numel(), ALGORITHMS[name]
    divisor, reduction = divided(op, size)
    operands = [
        flat if kind == "allgather" else operand_of(flat, reduction, divisor, algorithm.MEETS_AT_OWNER, chunks[rank])
        for rank, flat in enumerate(data)
    ]
    simulate(
        lambda rank: schedule_of(kind, name, rank, size, numel, chunks), operands, 4 * 23 if numel < 1000 else None
    )


@algorithms
@pytest.mark.parametrize("size", range(1, 18))
def test_bits_of_the_executor(name: str, size: int, mesh_of) -> None:
    """Kind: same bits as the Python executor, every algorithm, 1..17 ranks, dtypes and ops."""
    mesh = mesh_of(size)
    for at, dtype in enumerate(DTYPES):
        ops = ops_for(dtype)
        # Two operations for each number of ranks: all of them come up in five.
        for op in {ops[(size + at) % len(ops)], ops[(size + at + 2) % len(ops)]}:
            numel = (1, 2, 101, 257, 64 * size, 331)[(at + size + len(op)) % 6]
            chunks = ALGORITHMS[name].owners(numel, size)
            data = [noise(rank, numel, dtype) for rank in range(size)]
            want = [each.clone() for each in data]
            run_all(mesh, "allreduce", name, data, op, chunks)
            run_reference("allreduce", name, want, op, chunks)
            assert all(same_bits(got, bits) for got, bits in zip(data, want, strict=True)), (dtype, op, numel)


@algorithms
@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("cut", ["even", "root", "odd"])
def test_halves(name: str, size: int, cut: str, mesh_of) -> None:
    """Kind: reduce-scatter and allgather on chunks of any size, with reduce and broadcast among them."""
    mesh, numel = mesh_of(size), 157
    stops = [numel * (rank + 1) ** 2 // size**2 for rank in range(size)]
    odd = tuple(Range(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True))
    chunks = {"even": split(numel, size), "root": whole_at(size // 2, numel, size), "odd": odd}[cut]
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for kind, op in (("reduce_scatter", "sum"), ("reduce_scatter", "max"), ("allgather", "sum")):
            data = [noise(rank, numel, dtype) for rank in range(size)]
            want = [each.clone() for each in data]
            run_all(mesh, kind, name, data, op, chunks)
            run_reference(kind, name, want, op, chunks)
            for rank, (got, bits) in enumerate(zip(data, want, strict=True)):
                own = chunks[rank] if kind == "reduce_scatter" else Range(0, numel)
                assert same_bits(got[own.start : own.stop], bits[own.start : own.stop]), (dtype, kind, op, rank)


@algorithms
@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_frames_that_wait_half_way(name: str, size: int) -> None:
    """On a slow link a frame waits in the middle while other rows become ready: none may leave before its turn, and no
    number that is still to be sent may change."""
    mesh = Mesh(size, narrow=True)
    for dtype, numel in ((torch.float32, 60_001), (torch.bfloat16, 100_003)):
        chunks = ALGORITHMS[name].owners(numel, size)
        data = [noise(rank, numel, dtype) for rank in range(size)]
        want = [each.clone() for each in data]
        run_all(mesh, "allreduce", name, data, "sum", chunks, 2048)
        run_reference("allreduce", name, want, "sum", chunks)
        assert all(same_bits(got, bits) for got, bits in zip(data, want, strict=True)), dtype
    mesh.close()
