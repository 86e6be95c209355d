"""What the user may choose for any strategy."""

from __future__ import annotations

from dataclasses import dataclass

from ..collectives.select import CHOICES
from ..errors import UsageError
from ..native.dtypes import WIRES
from ..precision.loss_scale import LossScale


@dataclass(frozen=True)
class Options:
    """Of :func:`commlab.strategy`; what a strategy can't do with one of them it refuses itself."""

    algorithm: str = "auto"
    precision: str = "fp32"
    autocast: str = "auto"
    """16-bit matrix products, for precision bf16 and fp16: auto (where they are fast), on, off."""
    loss_scale: LossScale | None = None
    """Where it starts, and how it grows and falls, for precision fp16 and apex; None: as LossScale() does."""
    apex_level: str | None = None
    """For precision apex: O1 or O2 of apex.amp, where Apex still has it; None: without apex.amp, as O2."""
    wire: str | None = None
    max_grad_norm: float | None = None
    """Clip the reduced gradient to this global 2-norm; None: don't compute it."""
    bucket_bytes: int | None = None
    """The most that is sent together; None: :func:`commlab.gradients.bucket.usual_bytes`; ddp: torch's own."""
    overlap: bool = True
    """Buckets leave while backward goes on; False: the same buckets, once it has ended. For ps, dps and allreduce."""
    elementwise: bool | None = None
    """Say True for an optimizer of your own that updates every number from that number's own gradient and state
    alone."""
    servers: int | None = None
    """Ranks that only serve, for ps (1) and dps (2 and more); None: every rank trains, and serves."""
    consistency: str = "bsp"
    """When a worker may read, where there are such servers: bsp, ssp:S, asp."""
    overlap_pulls: bool = False
    """Where there are such servers: step() does not wait for the new parameters; the next forward does, for each where
    it first reads it. Until then only forward, ``state_dict()`` and ``engine.settle()`` may look at parameters."""

    def check(self) -> None:
        """UsageError for what no strategy knows."""
        if self.wire not in WIRES:
            raise UsageError(f"unknown wire {self.wire!r}; there are none, fp16, bf16")
        if self.algorithm not in CHOICES:
            raise UsageError(f"unknown algorithm {self.algorithm!r}; there are {', '.join(CHOICES)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UsageError(f"max_grad_norm must be positive, not {self.max_grad_norm}; None turns clipping off")
