"""The engine: what the user calls in the training loop, whatever the strategy.

backward()   the strategy computes gradients; buckets leave as they become complete
             then the reduced gradient is in p.grad, where this rank has it, and may be edited
step()       wait for the exchange | verdict | clip | update | pull
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from .. import trace
from ..errors import AgreedError, DisagreementError, UsageError
from ..gradients.hooks import GradientBuckets
from ..gradients.parameters import NamedParameter
from ..native.norm import clip_factor
from ..runtime.group import Group
from .changes import find_change
from .claims import Claim
from .comparisons import Comparisons
from .holders import Levels
from .nonfinite import not_finite_error
from .protocol import Strategy
from .reduced import ReducedGradient, norms


@dataclass
class Times:
    """Seconds in which this rank's model stood still, since the user last put in a new one."""

    exchange_s: float = 0.0
    """Packing and launching inside backward, waiting for peers, agreeing on the norm, pulling parameters."""
    forward_wait_s: float = 0.0
    """Of ``exchange_s``: waiting for pulls inside forward."""
    update_s: float = 0.0
    """Clipping and the optimizer."""


class Engine:
    """Trains a model on all ranks of a group. Built by :func:`commlab.strategy`; all ranks must make the same calls.

    At construction all that rank 0 has (parameters, buffers, the optimizer's state and hyper-parameters) has become all
    ranks'.
    """

    def __init__(self, strategy: Strategy):
        training = strategy.training
        self.strategy = strategy
        """How gradients become agreed updates."""
        self.name = strategy.name
        """The strategy's name."""
        self.role = strategy.role
        """"server" on a rank that only served, whose engine is of no more use; else "worker"."""
        self.averages = strategy.averages
        """Whether the ranks' gradients of a step become one; under ssp and asp they do not."""
        self.shards_state = strategy.shards_state
        """Whether ranks hold different pieces of the optimizer's state; else every rank holds all of it."""
        self.model = training.model
        """The user's own model."""
        self.optimizer = training.optimizer
        """The user's own optimizer, which keeps its groups, hyper-parameters and schedulers."""
        self.group = training.group
        """The ranks that train."""
        self.options = training.options
        """What the user has chosen."""
        self.precision = training.precision
        """What the model is computed in, and the loss scale."""
        self.in_window = training.in_window
        """Whether buckets lie in memory that the ranks share."""
        self.skipped_steps = 0
        """Steps without an update, because a gradient was not finite."""
        self.grad_norm: float | None = None
        """Global 2-norm of the last step's reduced gradient, before clipping; None where max_grad_norm is None."""
        self.times = Times()
        """Seconds in which this rank's model stood still; the user may put in a new one, to begin anew."""
        self._training = training
        self._comparisons = Comparisons(strategy)
        self._assigned_step: int | None = None
        """The step that :meth:`turns` has given out last."""
        self._backward_done = False
        self._failed = False
        """Whether a backward pass has ended in an exception."""
        self._accumulates = False
        """Whether backward() calls of this step may have left gradients inside no_sync."""
        self._stale = False
        """Whether the last step has left its gradients."""
        self._reduced: tuple[list[ReducedGradient], set[int]] | None = None
        """What :meth:`reduced_gradients` has given out in this step, and the parameters without a gradient."""
        self.buckets.listening = False
        self._closed = self.role == "server"
        if self.role == "worker":
            training.structure.look()
            strategy.look_before_forward(self._take_in_changes)
            self._claim = Claim(
                self.name, training.optimizer, training.parameters, self.zero_grad, sharded=training.planned.rebound
            )

    @property
    def parameters(self) -> Sequence[NamedParameter]:
        """What is trained, in registration order."""
        return self._training.parameters

    @property
    def buckets(self) -> GradientBuckets:
        """The gradients that commlab sends; without buckets where a library exchanges them."""
        return self.strategy.buckets

    @property
    def steps(self) -> int:
        """Steps that were made, skipped ones included."""
        return self._training.steps

    @property
    def own_buffers(self) -> bool:
        """Whether every rank has buffers of its own."""
        return self.options.buffers == "local"

    @property
    def saves_state(self) -> bool:
        """Whether this rank's :meth:`state_dict` belongs into a checkpoint; else another rank has the same."""
        return self.strategy.saves_state

    @property
    def across(self) -> Group | None:
        """The ranks that update what this rank does, one on each node; None where each shard is updated once."""
        return self._training.across

    @property
    def levels(self) -> Levels | None:
        """The groups by which gradients travel where the node is the unit; else None."""
        return self._training.levels

    @property
    def sharding(self) -> str:
        """The unit of ``ps`` and ``dps`` on several nodes, and why, in a line for the user; else empty."""
        return self._training.shard_reason

    # A step.

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
        :meth:`reduced_gradients` is for every strategy.
        """
        if self._closed:
            self._refuse("backward()")
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
        self._comparisons.backward_begins(loss)
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
                if self._stale:
                    raise UsageError(
                        "gradients of the last step are still there: call engine.zero_grad() after engine.step()"
                    )
                raise UsageError(
                    f"parameter {item.name!r} has a gradient already, from another backward pass than this engine's "
                    "(another engine's, which went through this model, or loss.backward()): call engine.zero_grad() "
                    "before engine.backward(); run it inside engine.no_sync() where it is to count"
                )

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward() only accumulates on this rank; for all micro-batches of a step but the last. Put the
        forward pass inside too: there ``ddp`` decides whether to exchange."""
        if self._closed:
            self._refuse("no_sync()")
        self.buckets.syncing, self._accumulates = False, True
        try:
            with self.strategy.no_sync():
                yield
        finally:
            self.buckets.syncing = True

    def reduced_gradients(self) -> list[ReducedGradient]:
        """The reduced gradient between backward() and step(), in the pieces of it that this rank can edit: whole
        parameters, or under ``ps`` and ``dps`` the ranges that this rank updates. What is written into ``piece.tensor``
        is what the optimizer gets, and what the norm of ``max_grad_norm`` is of. Parameters that had no gradient on any
        rank are left out. Collective. Cost: one small exchange; with a loss scale a copy of the pieces.

        UsageError with dedicated servers, which alone have the reduced gradient.
        """
        return self._reduced_gradients("reduced_gradients")[0]

    def gradient_norms(self) -> dict[str, float]:
        """The 2-norm of every parameter's reduced gradient, by name, the same on all ranks; between backward() and
        step(). As :meth:`reduced_gradients`, whose edits it sees. Collective. Cost: a pass over this rank's pieces, and
        under ``ps`` and ``dps`` an exchange of 8 bytes a parameter."""
        pieces, unused = self._reduced_gradients("gradient_norms")
        return norms(self._training.holders, self.parameters, pieces, unused, sharded=self.shards_state)

    def _reduced_gradients(self, call: str) -> tuple[list[ReducedGradient], set[int]]:
        if not self._backward_done:
            raise UsageError(f"{call}() is for the time between backward(), outside no_sync(), and step()")
        if self._reduced is None:
            self._reduced = self.strategy.reduced(self.precision.scale)
        return self._reduced

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
            self._refuse("step()")
        if callable(number):
            raise UsageError(
                "engine.step() takes no closure: gradients are computed by engine.backward(), once a step. An engine "
                "can't run an optimizer that evaluates the model again and again (LBFGS)"
            )
        if not self._backward_done:
            raise UsageError("step() without a backward() outside no_sync(): there is no gradient to agree on")
        strategy = self.strategy
        started_s = time.perf_counter()
        with trace.span("exchange"):
            self.buckets.wait()
            if self._reduced is not None:
                for piece in self._reduced[0]:
                    piece.put_back()
            self._comparisons.step_begins(self._assigned_step if number is None else number)
            try:
                verdict = strategy.agree()
                self._comparisons.compare_replicas(verdict)
            except (AgreedError, DisagreementError):
                if strategy.drops_steps:
                    self._drop()  # as on every other rank
                    self._comparisons.step_dropped()
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
                self._refuse_not_finite(rule)
            if updates:
                self._claim.stepping = True
                try:
                    strategy.update(clip / scale, verdict.unused)
                finally:
                    self._claim.stepping = False
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
            self._comparisons.step_ends(verdict)
        waited_s, self._training.forward_wait_s = self._training.forward_wait_s, 0.0
        self.times.forward_wait_s += waited_s
        self.times.exchange_s += waited_s + agreed_s - started_s + time.perf_counter() - updated_s
        self.times.update_s += updated_s - agreed_s
        self._begin_step()
        self._stale = strategy.keeps_gradients
        self._training.steps += 1
        return updates

    def _refuse_not_finite(self, rule: str) -> None:
        """Raise NotFiniteError; the step is dropped. Collective."""
        instead = 'Take a smaller learning rate, or clip; nonfinite="skip" leaves such steps out'
        if rule == "torch":
            instead = (
                f"It could not travel on wire {self.options.wire}: use precision fp16, which scales the loss and skips "
                'such steps, or wire bf16 or none, or nonfinite="skip"'
            )
        error = not_finite_error(self._training, self.buckets, instead)
        self.strategy.pull()
        self._drop()
        self._comparisons.step_dropped()
        raise error

    def zero_grad(self) -> None:
        """Drop all gradients, so that the next backward starts anew; what was accumulated inside :meth:`no_sync`, and
        what a backward pass has left that ended in an exception on all ranks, too. Also those of frozen parameters, but
        not of what another engine trains."""
        if self._closed:
            self._refuse("zero_grad()")
        if self._backward_done:
            raise UsageError(
                "zero_grad() between backward() and step(): the gradients are on their way "
                "already; call it after step()"
            )
        self.buckets.drain()
        self._drop()
        self._comparisons.gradients_dropped()

    def _drop(self) -> None:
        """Drop the step that is under way, and all gradients."""
        self.strategy.forget()
        training = self._training
        own = [item.tensor for item in (*training.parameters, *training.frozen)]
        for tensor in own if self.options.partial else training.structure.parameters:
            tensor.grad = None
        self._begin_step()
        self._comparisons.gradients_dropped()

    def _begin_step(self) -> None:
        self.buckets.reset()
        self.buckets.held = False
        self._training.counts.reset()
        self._backward_done = self._stale = self._failed = self._accumulates = False
        self._reduced = None

    # Between steps.

    def _take_in_changes(self, *, closing: bool = False) -> None:
        """Find out what is trained from now on, and plan anew where that is something else. Collective where it is.
        ``closing``: the engine trains no more, and a strategy that can't plan anew need not."""
        training = self._training
        if training.structure.same():
            return
        agree = find_change(training.group, training.structure, training.planned, training.model)
        if agree is not None:
            within_step = self._backward_done or training.counts.counted is not None
            if within_step and not closing:
                raise UsageError(
                    f"rank {self.group.rank}: {training.structure.described()} within a step; change what is trained "
                    "after engine.step(), before the next step's first backward()"
                )
            before = self.buckets
            try:
                roster = agree()
                if closing:
                    training.members = roster.members
                if not within_step:
                    self.strategy.replan(roster)
            except AgreedError:
                if not closing:
                    raise
            # A step may have begun inside no_sync.
            self.buckets.listening = False
            self.buckets.syncing, self.buckets.overlap = before.syncing, before.overlap
            self._claim.train(training.parameters)
        training.structure.look()
        if agree is not None:
            self._comparisons.took_note()

    def _require_planned(self, call: str) -> None:
        """For calls that are not collective: UsageError where ranks have still to agree on what is trained."""
        if self._closed:
            self._refuse(call)
        if not self._training.structure.same():
            training = self._training
            if find_change(training.group, training.structure, training.planned, training.model) is not None:
                raise UsageError(
                    f"rank {self.group.rank}: {call} before all ranks have taken in that "
                    f"{training.structure.described()}; call engine.settle() on all of them first"
                )

    def _refuse(self, call: str) -> NoReturn:
        if self.role == "server":
            raise UsageError(f"{call} on a rank that has only served; there is nothing to call on its engine")
        raise UsageError(
            f"{call} on an engine that was closed: model and optimizer are yours again; build another engine with "
            "commlab.strategy()"
        )

    def turns(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(step, whose share of it), in the order in which this rank is to train on them, until all shares of steps
        ``start .. stop - 1`` are given out. In lockstep each rank has its own share of every step; where ranks do not
        wait for each other, whoever is free gets the next one that nobody has."""
        if self._closed:
            self._refuse("turns()")
        return self._assignments(start, stop)

    def _assignments(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for step, rank in self.strategy.assignments(start, stop):
            self._assigned_step = step
            yield step, rank
        self._assigned_step = None

    def settle(self, last: bool = False) -> None:
        """Make every rank's parameters the newest, in full precision, before they are evaluated or saved. Collective.
        ``last``: this rank will train no more. What has changed of what is trained is taken in. Buffers become alike by
        the rule of ``buffers``, and ranks compare a digest of all that each has a copy of: DisagreementError, on all
        ranks, where copies differ."""
        if self._closed:
            self._refuse("settle()")
        self._take_in_changes()
        self.strategy.finish(last)
        self._comparisons.settle()

    def update_parameters(self, change: Callable[[torch.nn.Module], object]) -> None:
        """Run ``change(model)``, which writes parameters and buffers in place, so that it takes effect once on every
        copy: under ``dps`` and ``ps`` ranks of a node share one. What rank 0's call has written is everybody's
        afterwards, so ``change`` may draw random numbers. Collective."""
        if self._closed:
            self._refuse("update_parameters()")
        self._take_in_changes()
        self.strategy.update_parameters(change)
        self.strategy.edits.updated(set())
        self._comparisons.took_note()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the optimizer's state, by parameter name and range; call it between steps, without
        communication but for dedicated servers, which are asked. All ranks' parts together are the whole, whatever the
        strategy and the number of ranks. The model's own state is ``model.state_dict()``."""
        self._require_planned("state_dict()")
        loss_scale = self.precision.loss_scale
        return {
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "loss_scale": None if loss_scale is None else loss_scale.state_dict(),
            **self.strategy.state(),
        }

    def load_state_dict(self, *parts: dict[str, Any]) -> None:
        """Take from ``parts`` (any ranks' :meth:`state_dict`, of any strategy and number of ranks) what this rank owns.
        UsageError when a needed range is in none of them, or when they are not all of one step. With dedicated servers
        collective."""
        self._require_planned("load_state_dict()")
        for key in ("steps", "skipped_steps", "loss_scale"):
            values = [part[key] for part in parts]
            if any(value != values[0] for value in values):
                raise UsageError(
                    f"rank {self.group.rank}: the parts to load differ in {key!r}: {', '.join(map(str, values))}; they "
                    "were not saved together. Load the parts of one checkpoint"
                )
        self.strategy.load(parts)
        self.strategy.edits.note_pieces()
        self._training.steps, self.skipped_steps = parts[0]["steps"], parts[0]["skipped_steps"]
        if self.precision.loss_scale is not None and parts[0]["loss_scale"] is not None:
            self.precision.loss_scale.load_state_dict(parts[0]["loss_scale"])

    @property
    def serving(self) -> str:
        """How parameters are served, in a line for the user; empty where no ranks only serve."""
        return self.strategy.serving

    def serving_report(self) -> dict[str, str]:
        """What servers report at the end: rows of the trainer's summary. Collective."""
        if self._closed:
            self._refuse("serving_report()")
        return self.strategy.serving_report()

    def close(self, *, state: bool = True) -> None:
        """Take the hooks off the model, give the window's memory back, and let model and optimizer be the user's again:
        whole parameters in the optimizer's groups, with all that the ranks' optimizers remember of them, so that
        training can go on without commlab, or under another strategy. Collective; a second call does nothing.

        ``state``: False drops what the optimizer remembers where ranks hold pieces of it (``ps``, ``dps``), and with
        it one allgather of the state and the memory for all of it on every rank; the optimizer refuses to step then.
        Every other call on a closed engine raises UsageError.
        """
        if self._closed:
            return
        self._take_in_changes(closing=True)
        self._closed = True
        self._comparisons.close()
        try:
            self.strategy.close(state=state)
        finally:
            self._claim.release(spent=not state and self.shards_state)
