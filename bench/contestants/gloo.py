"""torch.distributed's collectives over gloo; its process group meets over MPI. Its threads sleep while it is idle."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from commlab.job.launch import detect

from ..core.harness import Block, Contestant, Unavailable, missing
from .case import Case

TIMEOUT_S = 300.0


def connect() -> None:
    """Make torch's default process group once, and leave it: gloo has no threads that disturb others. Collective."""
    if dist.is_initialized():
        return
    from commlab.transport.rendezvous import store_for

    launch = detect()
    store = dist.PrefixStore("bench gloo", store_for(launch, TIMEOUT_S))
    dist.init_process_group(
        "gloo", store=store, rank=launch.rank, world_size=launch.size, timeout=timedelta(seconds=TIMEOUT_S)
    )


def _named(now: str, before: str) -> Callable[..., Any]:
    """Newer torch has some operations under new names, and warns about the old ones."""
    found: Callable[..., Any] = getattr(dist, now, None) or getattr(dist, before)
    return found


def blocks(case: Case) -> list[Block]:
    if not dist.is_available() or not dist.is_gloo_available():
        return [missing("gloo", "this torch was built without it", kind="peer", peer="gloo")]
    way: Callable[[], Any] = {
        "allreduce": partial(dist.all_reduce, case.whole),
        "reduce_scatter": partial(_named("reduce_scatter_single", "reduce_scatter_tensor"), case.part, case.whole),
        "allgather": partial(_named("all_gather_single", "all_gather_into_tensor"), case.whole, case.part),
        "broadcast": partial(dist.broadcast, case.whole, 0),
    }[case.op]
    result = case.part if case.op == "reduce_scatter" else case.whole

    def run() -> torch.Tensor:
        try:
            way()
        except RuntimeError as error:
            if "support" in str(error):  # gloo lacks an operation, or a dtype
                raise Unavailable(str(error).splitlines()[0]) from error
            raise
        return result

    return [Block([Contestant("gloo", run, case.fill, case.wrong, {"kind": "peer", "peer": "gloo"})], start=connect)]
