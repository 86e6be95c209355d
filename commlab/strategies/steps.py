"""What a training loop calls in each step, whatever the strategy.

backward()   the strategy computes gradients; buckets leave as they become complete
             then the reduced gradient is in p.grad, where this rank has it, and may be edited
step()       wait for the exchange | verdict | clip | update | pull
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from .. import trace
from ..errors import AgreedError, DisagreementError, UsageError
from ..gradients.hooks import GradientBuckets
from ..gradients.parameters import NamedParameter
from ..native.norm import clip_factor
from .claims import Claim
from .comparisons import Comparisons
from .nonfinite import not_finite_error
from .protocol import Strategy
from .reduced import ReducedGradient
from .refusals import closed_error, closure_error, driven_error, gradients_left_error
from .replan import take_in_changes


@dataclass
class Times:
    """Seconds in which this rank's model stood still, since the user last put in a new one."""

    exchange_s: float = 0.0
    """Packing and launching inside backward, waiting for peers, agreeing on the norm, pulling parameters."""
    forward_wait_s: float = 0.0
    """Of ``exchange_s``: waiting for pulls inside forward."""
    update_s: float = 0.0
    """Clipping and the optimizer."""


class TrainingSteps:
    """The steps that a strategy makes. :class:`.engine.Engine` is one of them, and adds what is done between steps."""

    def __init__(self, strategy: Strategy):
        training = strategy.training
        self.strategy = strategy
        """How gradients become agreed updates."""
        self.role = strategy.role
        """"server" on a rank that only served, whose engine is of no more use; else "worker"."""
        self.averages = strategy.averages
        """Whether the ranks' gradients of a step become one; under ssp and asp they do not."""
        self.options = training.options
        """What the user has chosen."""
        self.precision = training.precision
        """What the model is computed in, and the loss scale."""
        self.skipped_steps = 0
        """Steps without an update, because a gradient was not finite."""
        self.grad_norm: float | None = None
        """Global 2-norm of the last step's reduced gradient, before clipping; None where max_grad_norm is None."""
        self.times = Times()
        """Seconds in which this rank's model stood still; the user may put in a new one, to begin anew."""
        self._training = training
        self._comparisons = Comparisons(strategy)
        self._closed = self.role == "server"
        self._updating = False
        """Whether the strategy updates, and may step the optimizer."""
        self._assigned_step: int | None = None
        """The step that ``turns()`` has given out last."""
        self._backward_done = False
        self._failed = False
        """Whether a backward pass has ended in an exception."""
        self._accumulates = False
        """Whether backward() calls of this step may have left gradients inside no_sync."""
        self._stale = False
        """Whether the last step has left its gradients."""
        self._reduced: tuple[list[ReducedGradient], set[int]] | None = None
        """What ``reduced_gradients()`` has given out in this step, and the parameters without a gradient."""
        self.buckets.listening = False
        if self.role == "worker":
            training.structure.look()
            self._claim = Claim(
                strategy.name,
                training.optimizer,
                training.parameters,
                self.zero_grad,
                self._require_updating,
                sharded=training.planned.rebound,
            )

    @property
    def parameters(self) -> Sequence[NamedParameter]:
        """What is trained, in registration order."""
        return self._training.parameters

    @property
    def buckets(self) -> GradientBuckets:
        """The gradients that commlab sends; without buckets where a library exchanges them."""
        return self.strategy.buckets

    def autocast(self) -> AbstractContextManager[None]:
        """Context for the forward pass and the loss: the precision's compute dtype."""
        return self.precision.autocast()

    def backward(
        self,
        loss: torch.Tensor | None,
        count: float | None = None,
        total: float | None = None,
        *,
        retain_graph: bool = False,
    ) -> None:
        """Compute gradients and start them on their way. Collective, unless inside :meth:`no_sync`.

        ``loss``: a scalar. Without ``count`` the gradients of all ranks' losses are averaged. With ``count``, ``loss``
        is a *sum* over that many items (tokens), or one weighted with weights of that sum (any number from 0 on), and
        the step's gradient is the sum over all ranks and micro-batches divided once by the global count, so ragged
        batches weigh right; where the global count is 0 the gradient is 0. ``total``: the step's global count over all
        ranks and micro-batches, where the caller knows it; else the ranks' counts are summed by one more small
        exchange. A rank with nothing to do passes ``None, 0``. One call per step outside ``no_sync``. UsageError for a
        count that is negative, infinite or NaN. ``retain_graph``: as torch's, where another loss of the same graph
        follows.

        Where every rank has the whole gradient (all strategies but ``ps`` and ``dps``) it is in ``p.grad`` afterwards,
        reduced, and multiplied by the loss scale where there is one; edits of it until :meth:`step` count, and must be
        the same on all ranks. Under ``ps`` and ``dps`` ``p.grad`` raises UsageError when it is touched:
        ``reduced_gradients()`` is for every strategy.
        """
        if self._closed:
            raise closed_error(self.role, "backward()")
        if self._backward_done:
            raise UsageError(
                "a second backward() in one step: run all but the last inside engine.no_sync(), "
                "and call engine.step() after the last"
            )
        if not self._training.structure.same():
            self._take_in_changes()
        counts, buckets, loss_scale = self._training.counts, self.buckets, self.precision.loss_scale
        counts.require_alike(count)
        if loss is None and count != 0:
            raise UsageError("backward(None) is for a rank without samples: pass count=0 with it")
        self._require_no_gradients()
        counts.add(count, total)
        self._training.record.backward_begins(loss, buckets.syncing)
        if buckets.syncing and self.averages:
            counts.sum_counts()
        if loss_scale is not None:
            counts.make_room()
            loss = None if loss is None else loss * (loss_scale.value / counts.divisor)
        buckets.come_last()
        buckets.listening = self._failed = True
        try:
            with trace.span("backward"):
                self.strategy.backward(loss, retain_graph)
        finally:
            buckets.listening = False
        if buckets.syncing:
            buckets.flush()
            flushed_s = time.perf_counter()
            self.strategy.complete()
            self.times.exchange_s += buckets.launch_s + time.perf_counter() - flushed_s
        # Last: a backward pass that ended in an exception can be dropped, by zero_grad().
        self._failed, self._backward_done = False, buckets.syncing
        buckets.held = buckets.syncing

    def _take_in_changes(self, *, closing: bool = False) -> None:
        """Plan anew where something else is to be trained. Collective where it is."""
        within_step = self._backward_done or self._training.counts.counted is not None
        if take_in_changes(self.strategy, within_step=within_step, closing=closing):
            self._claim.train(self._training.parameters)
            self._comparisons.took_note()

    def _require_no_gradients(self) -> None:
        """UsageError where gradients are there that backward() calls of this step have not left."""
        if self._failed:
            raise UsageError(
                "the last backward() ended in an exception, and what it has left must not be added to: call "
                "engine.zero_grad() on all ranks"
            )
        if self._accumulates:
            return
        for item in self.parameters:
            if item.tensor.grad is not None:
                raise gradients_left_error(item.name, stale=self._stale)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward() only accumulates on this rank; for all micro-batches of a step but the last. Put the
        forward pass inside too: there ``ddp`` decides whether to exchange."""
        if self._closed:
            raise closed_error(self.role, "no_sync()")
        self.buckets.syncing, self._accumulates = False, True
        try:
            with self.strategy.no_sync():
                yield
        finally:
            self.buckets.syncing = True

    def step(self, number: int | None = None) -> bool:
        """Finish the exchange, clip, update, and give every rank the new parameters. Collective. Returns whether there
        was an update, and a scheduler should advance only then: a step whose gradient is not finite on any rank is
        skipped on all of them with precision fp16, and with ``nonfinite="skip"``.

        ``number``: the caller's own number of the step, or of the batch, for ranks to compare; None: they compare what
        has happened on each since the last step. DisagreementError, on every rank and before anything is updated, where
        ranks are not in the same step, or would update with different hyper-parameters, or have different copies of
        the parameters. NotFiniteError, on every rank, as ``nonfinite`` says.
        """
        if self._closed:
            raise closed_error(self.role, "step()")
        if callable(number):
            raise closure_error()
        if not self._backward_done:
            raise UsageError("step() without a backward() outside no_sync(): there is no gradient to agree on")
        strategy, training, record = self.strategy, self._training, self._training.record
        every = self.options.check_replicas
        due = self.averages and every > 0 and (training.steps + 1) % every == 0  # to compare copies
        started_s = time.perf_counter()
        with trace.span("exchange"):
            strategy.buckets.wait()
            if self._reduced is not None:
                for piece in self._reduced[0]:
                    piece.put_back()
            record.step_begins(self._assigned_step if number is None else number, training.steps)
            try:
                verdict = strategy.agree()
                if due or verdict.written or self._comparisons.written_steps:
                    self._comparisons.compare_replicas(verdict.written, due)
            except (AgreedError, DisagreementError):
                if strategy.drops_steps:
                    self._drop()  # as on every other rank
                    record.reset()
                raise
        agreed_s = time.perf_counter()
        with trace.span("update"):
            loss_scale = self.precision.loss_scale
            scale = 1.0 if loss_scale is None else loss_scale.value
            rule = self.options.nonfinite if loss_scale is None else "skip"
            updates = verdict.finite or rule == "torch"
            clip = 1.0
            if self.options.max_grad_norm is not None:
                self.grad_norm = verdict.squares**0.5 / scale
                clip = clip_factor(self.grad_norm, self.options.max_grad_norm)
            if not verdict.finite and (rule == "error" or (rule == "torch" and self.options.wire is not None)):
                self._refuse_not_finite()
            if updates:
                self._updating = True
                try:
                    strategy.update(clip / scale, verdict.unused)
                finally:
                    self._updating = False
            else:
                self.skipped_steps += 1
            if loss_scale is not None:
                loss_scale.update(not updates)
        updated_s = time.perf_counter()
        with trace.span("pull"):
            strategy.pull()
            strategy.forget()
            if updates:
                strategy.edits.updated(verdict.unused)
            else:
                strategy.edits.note()
            if due or verdict.buffers:
                self._comparisons.make_buffers_alike(verdict.buffers, due)
            record.reset()
            if training.group.size > 1:
                training.structure.took_note()
        waited_s, training.forward_wait_s = training.forward_wait_s, 0.0
        self.times.forward_wait_s += waited_s
        self.times.exchange_s += waited_s + agreed_s - started_s + time.perf_counter() - updated_s
        self.times.update_s += updated_s - agreed_s
        self._begin_step()
        self._stale = strategy.keeps_gradients
        training.steps += 1
        return updates

    def _require_updating(self, *_: object) -> None:
        if not self._updating:
            raise driven_error(self._claim.who)

    def _refuse_not_finite(self) -> None:
        """Raise NotFiniteError; the step is dropped. Collective."""
        error = not_finite_error(self._training, self.buckets)
        self.strategy.pull()
        self._drop()
        self._training.record.reset()
        raise error

    def zero_grad(self) -> None:
        """Drop all gradients, so that the next backward starts anew; what was accumulated inside :meth:`no_sync`, and
        what a backward pass has left that ended in an exception on all ranks, too. Also those of frozen parameters, but
        not of what another engine trains."""
        if self._closed:
            raise closed_error(self.role, "zero_grad()")
        if self._backward_done:
            raise UsageError(
                "zero_grad() between backward() and step(): the gradients are on their way "
                "already; call it after step()"
            )
        self.buckets.drain()
        self._drop()
        self._training.record.gradients_dropped()

    def _drop(self) -> None:
        """Drop the step that is under way, and all gradients."""
        self.strategy.forget()
        training = self._training
        own = [item.tensor for item in (*training.parameters, *training.frozen)]
        for tensor in own if self.options.partial else training.structure.parameters:
            tensor.grad = None
        self._begin_step()

    def _begin_step(self) -> None:
        self.buckets.reset()
        self.buckets.held = False
        self._training.counts.reset()
        self._backward_done = self._stale = self._failed = self._accumulates = False
        self._reduced = None
