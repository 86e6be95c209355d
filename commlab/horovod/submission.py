"""An operation under way on this rank: what was asked for, and what its caller waits with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .announcement import Announcement


class HorovodInternalError(RuntimeError):
    """An operation failed: ranks disagree, a peer is gone or silent, or the job is being shut down. The text names
    ranks, tensor and both sides."""


class Submission:
    """``tensors``: this rank's contributions; ``outputs``: where results go, made by the execution where sizes are not
    known before. ``value``: what the caller is given at the end, made by ``finish(outputs)``."""

    __slots__ = (
        "_ready", "_waiters", "anew", "ended", "error", "finish", "outputs", "request", "since_s", "started_ns",
        "taken", "tensors", "urgent", "value",
    )  # fmt: skip

    def __init__(
        self,
        request: Announcement,
        tensors: Sequence[torch.Tensor] = (),
        outputs: Sequence[torch.Tensor] | None = None,
        finish: Callable[[list[torch.Tensor]], Any] | None = None,
    ):
        self.request, self.tensors = request, list(tensors)
        self.outputs: list[torch.Tensor] = list(outputs or ())
        self.finish = finish
        self.value: Any = None
        self.error: BaseException | None = None
        self.since_s = time.monotonic()
        self.started_ns = 0
        self.ended = False
        self.taken = False
        """Whether it is being announced, or carried out."""
        self.urgent = False
        """Whether somebody waits for it."""
        self.anew = False
        """Whether somebody has waited for another one before this one was submitted, so that the two can't travel
        together."""
        self._waiters: list[threading.Event] = []
        """Of those who wait by now: most operations have ended when somebody asks."""
        self._ready: Any = None
        if any(tensor.is_cuda for tensor in self.tensors):
            self._ready = torch.cuda.Event()
            self._ready.record()

    def await_device(self) -> None:
        """Return once the kernels that make the tensors have run."""
        if self._ready is not None:
            self._ready.synchronize()

    def end(self, error: BaseException | None = None) -> None:
        """Called once, by the thread that carries operations out."""
        if error is None:
            try:
                if self._ready is not None:
                    torch.cuda.synchronize()
                self.value = self.outputs if self.finish is None else self.finish(self.outputs)
            except BaseException as failed:
                error = failed
        self.error = error
        self.tensors = []
        self.ended = True
        for waiter in self._waiters:
            waiter.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the operation has ended within ``timeout_s``."""
        if self.ended:
            return True
        waiter = threading.Event()
        self._waiters.append(waiter)
        # end() may have looked at the list before.
        return self.ended or waiter.wait(timeout_s)

    def result(self) -> Any:
        """What the operation gives; a new HorovodInternalError where it failed, with this caller's traceback."""
        self.wait()
        if self.error is not None:
            raise HorovodInternalError(str(self.error)) from self.error
        return self.value
