"""MPI's own collectives through mpi4py, on the buffers themselves: nothing is pickled. Allreduce in place and not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from commlab.job import launch

from ..core.harness import Block, Contestant, missing
from .case import Case


def blocks(case: Case) -> list[Block]:
    if launch.detect().launcher is None:
        return [missing("MPI", "not started by mpirun", kind="peer", peer="mpi")]
    try:
        from mpi4py import MPI
    except ImportError as error:
        return [missing("MPI", f"mpi4py cannot be imported ({error})", kind="peer", peer="mpi")]
    whole, chunk, source = (_buffer(tensor, MPI) for tensor in (case.whole, case.chunk, case.source))
    comm: Any = MPI.COMM_WORLD
    ways: Mapping[str, Callable[[], None]] = {
        "allreduce": {
            "MPI_Allreduce": partial(comm.Allreduce, source, whole),
            "MPI_Allreduce in place": partial(comm.Allreduce, MPI.IN_PLACE, whole),
        },
        "reduce_scatter": {"MPI_Reduce_scatter_block": partial(comm.Reduce_scatter_block, source, chunk)},
        "allgather": {"MPI_Allgather": partial(comm.Allgather, chunk, whole)},
        "broadcast": {"MPI_Bcast": partial(comm.Bcast, whole, 0)},
    }[case.op]
    if case.dtype in (torch.float16, torch.bfloat16) and case.op in ("allreduce", "reduce_scatter"):
        return [missing(name, f"MPI cannot add {case.dtype}", kind="peer", peer="mpi") for name in ways]
    result = case.chunk if case.op == "reduce_scatter" else case.whole
    return [Block([_contestant(name, way, result, case)]) for name, way in ways.items()]


def _contestant(name: str, way: Callable[[], None], result: torch.Tensor, case: Case) -> Contestant:
    def work() -> torch.Tensor:
        way()
        return result

    return Contestant(name, work, case.fill, case.wrong, {"kind": "peer", "peer": "mpi"})


def _buffer(tensor: torch.Tensor, mpi: Any) -> list[Any]:
    """Memory and MPI datatype of a tensor; 16-bit floats as the 2-byte integers that they are to MPI."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return [tensor.view(torch.int16).numpy(), mpi.SHORT]
    return [
        tensor.numpy(),
        getattr(
            mpi,
            {"float32": "FLOAT", "float64": "DOUBLE", "int32": "INT32_T", "int64": "INT64_T"}[str(tensor.dtype)[6:]],
        ),
    ]
