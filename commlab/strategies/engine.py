"""The engine: what :func:`commlab.strategy` returns. It makes a strategy's steps (:mod:`.steps`), and here is what the
user calls before, between and after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import UsageError
from ..runtime.group import Group
from .holders import Levels
from .protocol import Strategy
from .reduced import ReducedGradient, norms
from .refusals import closed_error
from .replan import require_planned
from .steps import TrainingSteps


class Engine(TrainingSteps):
    """Trains a model on all ranks of a group. Built by :func:`commlab.strategy`; all ranks must make the same calls.

    At construction all that rank 0 has (parameters, buffers, the optimizer's state and hyper-parameters) has become all
    ranks'.
    """

    def __init__(self, strategy: Strategy):
        super().__init__(strategy)
        training = strategy.training
        self.name = strategy.name
        """The strategy's name."""
        self.shards_state = strategy.shards_state
        """Whether ranks hold different pieces of the optimizer's state; else every rank holds all of it."""
        self.model = training.model
        """The user's own model."""
        self.optimizer = training.optimizer
        """The user's own optimizer, which keeps its groups, hyper-parameters and schedulers."""
        self.group = training.group
        """The ranks that train."""
        self.in_window = training.in_window
        """Whether buckets lie in memory that the ranks share."""
        if self.role == "worker":
            strategy.look_before_forward(self._take_in_changes)

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

    def turns(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(step, whose share of it), in the order in which this rank is to train on them, until all shares of steps
        ``start .. stop - 1`` are given out. In lockstep each rank has its own share of every step; where ranks do not
        wait for each other, whoever is free gets the next one that nobody has."""
        if self._closed:
            raise closed_error(self.role, "turns()")
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
            raise closed_error(self.role, "settle()")
        self._take_in_changes()
        self.strategy.finish(last)
        self._comparisons.settle()

    def update_parameters(self, change: Callable[[torch.nn.Module], object]) -> None:
        """Run ``change(model)``, which writes parameters and buffers in place, so that it takes effect once on every
        copy: under ``dps`` and ``ps`` ranks of a node share one. What rank 0's call has written is everybody's
        afterwards, so ``change`` may draw random numbers. Collective."""
        if self._closed:
            raise closed_error(self.role, "update_parameters()")
        self._take_in_changes()
        self.strategy.update_parameters(change)
        self.strategy.edits.updated(set())
        self._comparisons.took_note()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the optimizer's state, by parameter name and range; call it between steps, without
        communication but for dedicated servers, which are asked. All ranks' parts together are the whole, whatever the
        strategy and the number of ranks. The model's own state is ``model.state_dict()``."""
        if self._closed:
            raise closed_error(self.role, "state_dict()")
        require_planned(self._training, "state_dict()")
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
        if self._closed:
            raise closed_error(self.role, "load_state_dict()")
        require_planned(self._training, "load_state_dict()")
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
            raise closed_error(self.role, "serving_report()")
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
        self._training.record.close()
        try:
            self.strategy.close(state=state)
        finally:
            self._claim.release(spent=not state and self.shards_state)
