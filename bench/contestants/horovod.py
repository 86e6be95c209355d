"""Horovod's allreduce in place, as it is and with Compression.fp16: the calls of its DistributedOptimizer.

Its background thread wakes every cycle and slows all else in the process, so Horovod is up only while it is measured.
Tensors are named, without which its response cache is of no use.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from ..core.harness import Block, Contestant, missing
from .case import Case


def blocks(case: Case) -> list[Block]:
    labels = {"kind": "peer", "peer": "horovod", "setting": setting()}
    if case.op != "allreduce":
        # Its reduce-scatter, allgather and broadcast all return new tensors, or serve start-up: no yardstick.
        return [missing("Horovod", f"is measured for allreduce only, not {case.op}", **labels)]
    try:
        import horovod.torch as hvd
    except ImportError as error:
        return [missing("Horovod", f"not installed ({error}): make horovod", **labels)]
    contestants = [Contestant("Horovod", partial(_plain, hvd, case.whole), case.fill, case.wrong, labels)]
    if case.dtype in (torch.float32, torch.float64):
        compressed = partial(_compressed, hvd, case.whole)
        contestants.append(
            Contestant("Horovod, Compression.fp16", compressed, case.fill, case.wrong, {**labels, "wire": "fp16"})
        )
    return [Block(contestants, start=hvd.init, stop=hvd.shutdown, disturbs=True)]


def setting() -> str:
    """Horovod's variables that were set by the user; its defaults otherwise."""
    settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("HOROVOD_"))
    return " ".join(settings) or "defaults"


def _plain(hvd: Any, tensor: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = hvd.allreduce_(tensor, op=hvd.Sum, name="whole")
    return result


def _compressed(hvd: Any, tensor: torch.Tensor) -> torch.Tensor:
    half, context = hvd.Compression.fp16.compress(tensor)
    result: torch.Tensor = hvd.Compression.fp16.decompress(hvd.allreduce_(half, op=hvd.Sum, name="half"), context)
    return result
