"""Watches backward, and lets buckets leave as soon as they are complete."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from .. import trace
from ..errors import UsageError
from .bucket import Bucket
from .parameters import NamedParameter


class GradientBuckets:
    """Watches backward through post-accumulate-grad hooks, packs what is complete, and launches it in index order.

    ``launch(bucket)`` starts the bucket on its way. ``scale()`` is asked for when a step's first bucket is packed, and
    multiplies all gradients of the step. ``poll()`` lets operations under way move on while backward computes.
    ``overlap``: False keeps all buckets until backward has ended.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        launch: Callable[[Bucket], None],
        scale: Callable[[], float],
        poll: Callable[[], None],
        *,
        keep_gradients: bool,
        overlap: bool = True,
    ):
        self.buckets = buckets
        self.syncing = True
        """Off inside ``no_sync``: gradients accumulate on this rank and nothing is launched."""
        self.overlap = overlap
        """Off: nothing leaves before :meth:`flush`. May change between two steps, on all ranks alike."""
        self.used: set[int] = set()
        """Parameters (by index) that have had a gradient since the last :meth:`reset`."""
        self._finite = True
        self.launch_s = 0.0
        """Time spent packing, launching and polling, inside backward and in :meth:`flush`, since the last
        :meth:`reset`."""
        self._launch, self._scale, self._poll = launch, scale, poll
        self._keep_gradients = keep_gradients
        self._next = 0
        self._travelling: deque[Bucket] = deque()
        """Packed and not launched yet: their copies to the host are under way."""
        self._step_scale: float | None = None
        self._hooks = [
            member.tensor.register_post_accumulate_grad_hook(self._hook(bucket, member))
            for bucket in buckets
            for member in bucket.parameters
        ]
        self.reset()

    def _hook(self, bucket: Bucket, member: NamedParameter) -> Callable[[torch.Tensor], None]:
        def on_gradient(_: torch.Tensor) -> None:
            self.used.add(member.index)
            if not self.syncing:
                return
            if member.index not in bucket.waiting:
                raise UsageError(
                    f"the gradient of {member.name!r} is ready a second time before step(): run "
                    "all backward() calls but the last "
                    "of a step inside engine.no_sync()"
                )
            bucket.waiting.discard(member.index)
            if not self.overlap:
                return
            started_s = time.perf_counter()
            self._launch_ready()
            self._poll()
            self.launch_s += time.perf_counter() - started_s

        return on_gradient

    def _launch_ready(self) -> None:
        while self._next < len(self.buckets) and not self.buckets[self._next].waiting:
            self._pack_next()
        while self._travelling and (self._travelling[0].mirror is None or self._travelling[0].mirror.arrived()):
            self._launch(self._travelling.popleft())

    @property
    def finite(self) -> bool:
        """Whether all that was packed since the last :meth:`reset` is finite. Waits for GPUs."""
        return self._finite and all(bucket.packer.finite() for bucket in self.buckets)

    def _pack_next(self) -> None:
        bucket = self.buckets[self._next]
        self._next += 1
        if self._step_scale is None:
            self._step_scale = self._scale()
        gradients = [member.tensor.grad for member in bucket.parameters]
        for member, gradient in zip(bucket.parameters, gradients, strict=True):
            if gradient is not None and gradient.is_sparse:
                raise UsageError(f"the gradient of {member.name!r} is sparse; use sparse=False in its embedding")
        with trace.span(f"pack {bucket.name}", "compute"):
            self._finite &= bucket.pack(gradients, self._step_scale)
        if not self._keep_gradients:
            for member in bucket.parameters:
                member.tensor.grad = None
        self._travelling.append(bucket)

    def flush(self) -> None:
        """After backward: launch what is left; parameters without a gradient on this rank travel as zeros."""
        started_s = time.perf_counter()
        while self._next < len(self.buckets):
            self._pack_next()
            self._launch_ready()
        self.launch_packed()
        self.launch_s += time.perf_counter() - started_s

    def launch_packed(self) -> None:
        """Launch all that is packed, once it has arrived: how much has by itself differs between ranks."""
        while self._travelling:
            bucket = self._travelling.popleft()
            if bucket.mirror is not None:
                bucket.mirror.wait()
            self._launch(bucket)

    def reset(self) -> None:
        """Get ready for the next step."""
        self._next, self._step_scale, self.launch_s, self._finite = 0, None, 0.0, True
        self._travelling.clear()
        self.used.clear()
        for bucket in self.buckets:
            bucket.packer.forget()
            bucket.squares.known = None
            bucket.waiting = {member.index for member in bucket.parameters}

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
