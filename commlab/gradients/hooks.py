"""Watches backward, and lets buckets leave as soon as they are complete."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .. import trace
from ..errors import UsageError
from .bucket import Bucket
from .parameters import NamedParameter

POLL_EVERY_S = 100e-6
"""Small layers have hooks more often, and a look at what is under way costs some of that time."""


class Waitable(Protocol):
    """The exchange of a bucket, under way."""

    @property
    def result(self) -> Any:
        """What this rank has of the exchange, once :meth:`wait` has returned."""

    def wait(self, timeout_s: float | None = None) -> Any:
        """Return once the exchange has ended; raise what went wrong."""


class GradientBuckets:
    """Watches backward through post-accumulate-grad hooks, packs each bucket that is complete, and launches buckets in
    index order.

    ``launch(bucket)`` starts a packed bucket on its way. ``scale()`` is called when a step's first bucket is packed,
    and returns what all gradients of the step are multiplied by. ``poll()`` lets operations under way move on while
    backward computes. ``keep_gradients``: whether ``p.grad`` stays when its bucket is packed. ``overlap``: False keeps
    all buckets until backward has ended.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        launch: Callable[[Bucket], Waitable],
        scale: Callable[[], float],
        poll: Callable[[], None],
        *,
        keep_gradients: bool,
        overlap: bool = True,
    ):
        self.buckets = buckets
        """In index order; none where a library exchanges the gradients."""
        self.launched: list[tuple[Bucket, Waitable]] = []
        """The buckets that have left since the last :meth:`reset`, in index order, and the exchange of each."""
        self.syncing = True
        """Whether complete buckets leave; off inside ``no_sync``, where gradients accumulate on this rank."""
        self.listening = True
        """Whether gradients that become ready belong to the step. An engine turns it off outside of its backward():
        there other backward passes, as another engine's, may reach its parameters."""
        self.held = False
        """Whether ``p.grad`` is a reduced gradient that waits for the update, to which nothing may be added."""
        self.overlap = overlap
        """Whether complete buckets leave during backward, or all of them in :meth:`flush`. May change between two
        steps, on all ranks alike."""
        self.used: set[int] = set()
        """Parameters (by index) whose gradient has been packed since the last :meth:`reset`."""
        self.launch_s = 0.0
        """Time spent packing, launching and polling, inside backward and in :meth:`flush`, since the last
        :meth:`reset`."""
        self.not_finite: str | None = None
        """The first parameter whose gradient was not finite when a CPU packed it, since the last :meth:`reset`."""
        self._launch, self._scale, self._poll = launch, scale, poll
        self._keep_gradients = keep_gradients
        self._finite = True
        self._next = 0
        self._poll_at_s = 0.0
        """When operations under way are next to be moved on."""
        self._packed: deque[Bucket] = deque()
        """Buckets that are packed and not launched yet: their copies to the host are under way."""
        self._step_scale: float | None = None
        self._hooks: list[tuple[torch.Tensor, Callable[[torch.Tensor], None], Any]] = []
        """Of each parameter: its hook, and the hook's handle."""
        for bucket in buckets:
            for member in bucket.parameters:
                hook = self._hook(bucket, member)
                handle = member.tensor.register_post_accumulate_grad_hook(hook)
                self._hooks.append((member.tensor, hook, handle))
        self.reset()

    def come_last(self) -> None:
        """Let the hooks here run after those that the user has put on parameters since, and which may change or use
        ``p.grad``. Cost: 0.1 us a parameter."""
        for at, (tensor, hook, handle) in enumerate(self._hooks):
            hooks = tensor._post_accumulate_grad_hooks
            if hooks and next(reversed(hooks)) != handle.id:
                handle.remove()
                self._hooks[at] = tensor, hook, tensor.register_post_accumulate_grad_hook(hook)

    def _hook(self, bucket: Bucket, member: NamedParameter) -> Callable[[torch.Tensor], None]:
        def on_gradient(_: torch.Tensor) -> None:
            if not self.listening:
                if self.held:
                    raise UsageError(
                        f"a backward pass that is not this engine's has added to the reduced gradient of "
                        f"{member.name!r}, between backward() and step(): call step() first, or "
                        "requires_grad_(False) on this engine's model while others go through it"
                    )
                return
            if not self.syncing:
                return
            if bucket.index < self._next:
                raise UsageError(
                    f"a gradient of {member.name!r} is ready after its bucket has left. Where a weight is used in two "
                    "segments of activation checkpointing, give torch.utils.checkpoint use_reentrant=False, or "
                    "commlab.strategy() overlap=False; where there are several backward() calls in one step, run all "
                    "but the last inside engine.no_sync()"
                )
            bucket.waiting.discard(member.index)
            if not self.overlap:
                return
            started_s = time.perf_counter()
            leaves = bucket.index == self._next and not bucket.waiting
            if not leaves and not self._packed and started_s < self._poll_at_s:
                return
            self._launch_ready()
            self._poll()
            stopped_s = time.perf_counter()
            self._poll_at_s = stopped_s + POLL_EVERY_S
            self.launch_s += stopped_s - started_s

        return on_gradient

    def _launch_ready(self) -> None:
        while self._next < len(self.buckets) and not self.buckets[self._next].waiting:
            self._pack_next()
        while self._packed and (self._packed[0].mirror is None or self._packed[0].mirror.arrived()):
            bucket = self._packed.popleft()
            self.launched.append((bucket, self._launch(bucket)))

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
            if gradient is not None:
                self.used.add(member.index)
            elif member.index not in bucket.waiting:
                raise UsageError(
                    f"the gradient of {member.name!r} was taken away during backward, before its bucket could leave: "
                    "by a hook that sets p.grad to None or updates the parameter itself? Gradients are reduced first, "
                    "and engine.step() updates"
                )
            if gradient is not None and gradient.layout is not torch.strided:
                raise UsageError(f"the gradient of {member.name!r} is sparse; use sparse=False in its embedding")
        with trace.span(f"pack {bucket.name}", "compute"):
            flat = bucket.flat if bucket.mirror is None else bucket.mirror.device
            finite = bucket.packer.pack(gradients, flat, self._step_scale)
            if not finite and self.not_finite is None:
                self.not_finite = _first_not_finite(bucket, flat)
            self._finite &= finite
            if bucket.mirror is not None:
                bucket.mirror.to_host()
        if not self._keep_gradients:
            for member in bucket.parameters:
                member.tensor.grad = None
        self._packed.append(bucket)

    def flush(self) -> None:
        """After backward: launch what is left; parameters without a gradient on this rank travel as zeros."""
        started_s = time.perf_counter()
        while self._next < len(self.buckets):
            self._pack_next()
            self._launch_ready()
        self._launch_packed()
        self.launch_s += time.perf_counter() - started_s

    def _launch_packed(self) -> None:
        while self._packed:
            bucket = self._packed.popleft()
            if bucket.mirror is not None:
                bucket.mirror.wait()
            self.launched.append((bucket, self._launch(bucket)))

    def wait(self) -> None:
        """Wait for the exchange of every bucket that has left."""
        for _, exchange in self.launched:
            exchange.wait()

    def drain(self) -> None:
        """End the exchange of all buckets that are packed, after a backward pass that has failed on all ranks. How many
        of them have left already differs between ranks. Collective."""
        self._launch_packed()
        self.wait()

    def reset(self) -> None:
        """Get ready for the next step."""
        self._next, self._step_scale, self.launch_s, self._finite = 0, None, 0.0, True
        self.not_finite = None
        self._packed.clear()
        self.launched.clear()
        self.used.clear()
        for bucket in self.buckets:
            bucket.packer.forget()
            bucket.squares.known = None
            bucket.waiting = {member.index for member in bucket.parameters}

    def close(self) -> None:
        """Remove the hooks."""
        for _, _, handle in self._hooks:
            handle.remove()


def _first_not_finite(bucket: Bucket, flat: torch.Tensor) -> str:
    """The name of the first parameter, in registration order, whose packed gradient is not finite."""
    for member, extent in sorted(zip(bucket.parameters, bucket.ranges, strict=True), key=lambda pair: pair[0].index):
        if not flat[extent.start : extent.stop].isfinite().all():
            return member.name
    raise AssertionError(f"{bucket.name} was said to hold a number that is not finite")
