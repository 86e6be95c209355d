"""What every strategy shares: one engine call for the user, buckets on their way during backward, one agreed norm and
clip."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .. import trace
from ..errors import CommlabError, UsageError
from ..gradients.bucket import Bucket
from ..native.norm import Squares, clip_factor
from ..runtime.group import Group
from .options import Options
from .start import Coupled
from .verdict import Agreement, agree


@dataclass
class Times:
    """Seconds in which this rank's model stood still, since the user last put in a new one."""

    exchange_s: float = 0.0
    """Packing and launching inside backward, waiting for peers, agreeing on the norm, pulling parameters."""
    forward_wait_s: float = 0.0
    """Of ``exchange_s``: waiting for pulls inside forward."""
    update_s: float = 0.0
    """Clipping and the optimizer."""


class Waitable(Protocol):
    """A bucket's exchange under way."""

    @property
    def result(self) -> Any: ...

    def wait(self, timeout_s: float | None = None) -> Any: ...


class Strategy(Coupled):
    """How gradients become agreed updates. Built by :func:`commlab.strategy`; all ranks must make the same calls.

    ``model``: what to call in the training loop (the user's own model, but for ``ddp``). At construction rank 0's
    parameters and buffers are given to all ranks.
    """

    averages: bool = True
    """Whether the ranks' gradients of a step become one; under ssp and asp they do not."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        super().__init__(model, optimizer, group, options)
        self.grad_norm: float | None = None
        """Global 2-norm of the last step's reduced gradient, before clipping; None where max_grad_norm is None."""
        self.times = Times()
        self._syncing = True
        self._backward_done = False
        self._stale = False
        self._launched: list[tuple[Bucket, Waitable]] = []

    # What differs between strategies.

    def _owned_squares(self) -> float:
        """After the exchange: the sum of the squares of a part of the reduced gradient; the parts of all ranks make up
        the whole."""
        raise NotImplementedError

    def _update(self, clip: float, unused: set[int]) -> None:
        """Multiply the gradient by ``clip`` (and 1 / loss scale) and step the optimizer; parameters in ``unused`` had
        no gradient on any rank."""
        raise NotImplementedError

    def _pull(self) -> None:
        """Give every rank the updated parameters, where they were updated elsewhere."""

    # The engine call.

    def autocast(self) -> AbstractContextManager[None]:
        """Context for the forward pass and the loss: the precision's compute dtype."""
        return self.precision.autocast()

    def backward(self, loss: torch.Tensor | None, count: int | None = None, total: int | None = None) -> None:
        """Compute gradients and start them on their way. Collective, unless inside :meth:`no_sync`.

        ``loss``: a scalar. Without ``count`` the gradients of all ranks' losses are averaged. With ``count``, ``loss``
        is a *sum* over that many items (tokens), and the step's gradient is the sum over all ranks and micro-batches
        divided once by the global count, so ragged batches weigh right. ``total``: the step's global count over all
        ranks and micro-batches, where the caller knows it; else the ranks' counts are summed by one more small
        exchange. A rank with nothing to do passes ``None, 0``. One call per step outside ``no_sync``.
        """
        if self._backward_done:
            raise UsageError(
                "a second backward() in one step: run all but the last inside engine.no_sync(), "
                "and call engine.step() after the last"
            )
        self._weight.require_alike(count)
        if loss is None and count != 0:
            raise UsageError("backward(None) is for a rank without samples: pass count=0 with it")
        if self._stale:
            raise UsageError("gradients of the last step are still there: call engine.zero_grad() after engine.step()")
        self._weight.add(count, total)
        if self._syncing and self.averages:
            self._weight.sum_counts()
        if self.buckets is not None:
            self.buckets.syncing = self._syncing
        if self.precision.loss_scale is not None:
            self._weight.make_room()
        scale = self.precision.scale / self._weight.share
        self._run_backward(loss if loss is None or scale == 1.0 else loss * scale)
        if self.buckets is not None and self._syncing:
            self.buckets.flush()
            self.times.exchange_s += self.buckets.launch_s
        # Last: a backward pass that ended in an exception can be dropped, by zero_grad().
        self._backward_done = self._syncing

    def _run_backward(self, loss: torch.Tensor | None) -> None:
        if loss is not None:
            with trace.span("backward"):
                loss.backward()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward() only accumulates on this rank; for all micro-batches of a step but the last. Put the
        forward pass inside too: there ``ddp`` decides whether to exchange."""
        self._syncing = False
        try:
            yield
        finally:
            self._syncing = True

    def step(self) -> bool:
        """Finish the exchange, clip, update, and give every rank the new parameters. Collective. Returns whether there
        was an update: with precision fp16 a step whose gradient overflowed on any rank is skipped on all of them, and a
        scheduler should not advance then."""
        if not self._backward_done:
            raise UsageError("step() without a backward() outside no_sync(): there is no gradient to agree on")
        started_s = time.perf_counter()
        with trace.span("exchange"):
            for _, handle in self._launched:
                handle.wait()
            agreement = self._agree()
        agreed_s = time.perf_counter()
        with trace.span("update"):
            scale, loss_scale = self.precision.scale, self.precision.loss_scale
            updates = loss_scale is None or agreement.finite
            if loss_scale is None and not agreement.finite and self.options.wire is not None:
                raise CommlabError(
                    f"rank {self.group.rank}: in step {self.steps} the gradient of some rank is not finite on wire "
                    f"{self.options.wire} (an overflow, inf or NaN); nothing was updated. Use precision fp16, which "
                    "scales the loss and skips such steps, or wire bf16 or none"
                )
            clip = 1.0
            if self.options.max_grad_norm is not None:
                self.grad_norm = agreement.squares**0.5 / scale
                clip = clip_factor(self.grad_norm, self.options.max_grad_norm)
            if updates:
                self._update(clip / scale, agreement.unused)
            else:
                self.skipped_steps += 1
            if loss_scale is not None:
                loss_scale.update(not updates)
        updated_s = time.perf_counter()
        with trace.span("pull"):
            self._pull()
        self.times.exchange_s += agreed_s - started_s + time.perf_counter() - updated_s
        self.times.update_s += updated_s - agreed_s
        self._begin_step()
        self._stale = self.keeps_gradients
        self.steps += 1
        return updates

    def zero_grad(self) -> None:
        """Drop all gradients, so that the next backward starts anew; what was accumulated inside :meth:`no_sync`, and
        what a backward pass has left that ended in an exception on all ranks, too."""
        if self._backward_done:
            raise UsageError(
                "zero_grad() between backward() and step(): the gradients are on their way "
                "already; call it after step()"
            )
        if self.buckets is not None:
            self.buckets.launch_packed()
        for _, handle in self._launched:
            handle.wait()
        for parameter in self.parameters:
            parameter.tensor.grad = None
        self._begin_step()

    def turns(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(step, whose share of it), in the order in which this rank is to train on them, until all shares of steps
        ``start .. stop - 1`` are given out. In lockstep each rank has its own share of every step; where ranks do not
        wait for each other, whoever is free gets the next one that nobody has."""
        yield from ((step, self.group.rank) for step in range(start, stop))

    # Shared parts.

    def _begin_step(self) -> None:
        self._launched.clear()
        if self.buckets is not None:
            self.buckets.reset()
        self._weight.reset()
        self._backward_done = self._stale = False

    @property
    def _wants_norm(self) -> bool:
        # With a loss scale also to see what overflowed only when it was added up: no rank packed an inf then.
        return self.options.max_grad_norm is not None or self.precision.loss_scale is not None

    def _squares(self, bucket: Bucket) -> Squares | None:
        """Who is to be told the squares of what this rank reduces of a bucket."""
        return bucket.squares if self._wants_norm else None

    def _agree(self) -> Agreement:
        """What is known of the reduced gradient once the last bucket is here. Collective."""
        assert self.buckets is not None
        squares = 0.0
        if self._wants_norm:
            squares = self._owned_squares()
        finite = self.buckets.finite and math.isfinite(squares) and self._unscale()
        return agree(self.group, squares, finite, self.buckets.used, len(self.parameters))
