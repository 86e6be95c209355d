"""torch.distributed's collectives over gloo; its process group meets over MPI. Its threads sleep while it is idle."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from commlab.job import launch

from ..core.harness import Block, Contestant, ContestantMissing, missing
from .case import Case

TIMEOUT_S = 300.0


def connect() -> None:
    """Make torch's default process group once, and leave it: gloo has no threads that disturb others. Collective."""
    if dist.is_initialized():
        return
    from commlab.transport.rendezvous import store_for

    here = launch.detect()
    store = dist.PrefixStore("bench gloo", store_for(here, TIMEOUT_S))
    dist.init_process_group(
        "gloo", store=store, rank=here.rank, world_size=here.size, timeout=timedelta(seconds=TIMEOUT_S)
    )


def _operation(name: str, old_name: str) -> Callable[..., Any]:
    """Newer torch has some operations under new names, and warns about the old ones."""
    found: Callable[..., Any] = getattr(dist, name, None) or getattr(dist, old_name)
    return found


def blocks(case: Case) -> list[Block]:
    if not dist.is_available() or not dist.is_gloo_available():
        return [missing("gloo", "this torch was built without it", kind="peer", peer="gloo")]
    way: Callable[[], Any] = {
        "allreduce": partial(dist.all_reduce, case.whole),
        "reduce_scatter": partial(_operation("reduce_scatter_single", "reduce_scatter_tensor"), case.chunk, case.whole),
        "allgather": partial(_operation("all_gather_single", "all_gather_into_tensor"), case.whole, case.chunk),
        "broadcast": partial(dist.broadcast, case.whole, 0),
    }[case.op]
    result = case.chunk if case.op == "reduce_scatter" else case.whole

    def work() -> torch.Tensor:
        try:
            way()
        except RuntimeError as error:
            if "support" in str(error):  # gloo lacks an operation, or a dtype
                raise ContestantMissing(str(error).splitlines()[0]) from error
            raise
        return result

    return [Block([Contestant("gloo", work, case.fill, case.wrong, {"kind": "peer", "peer": "gloo"})], start=connect)]
