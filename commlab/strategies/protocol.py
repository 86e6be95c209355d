"""What a strategy is: how the gradients of a step become agreed updates. :class:`commlab.strategies.engine.Engine` owns
one, and calls it in this order:

    backward        backward(loss)   and during it launch(bucket), for each bucket that is complete
                    complete()       outside no_sync: what p.grad is until step()
    between         reduced()        where the user wants to edit the reduced gradient
    step            agree()          once all buckets are here
                    update(...)      unless the step is skipped
                    pull()
    between steps   state(), load(), update_parameters(), finish()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..checkpoint import pieces
from ..gradients.bucket import Bucket
from ..gradients.hooks import GradientBuckets, Waitable
from .changes import Roster
from .copies import copy_from_rank_0, tensors_of
from .edits import Edits
from .reduced import ReducedGradient
from .start import Training
from .verdict import Verdict


class Strategy(ABC):
    """A way to agree. Built on all ranks of a group, from a model, the optimizer that has its parameters, the group and
    :class:`.options.Options`; the constructor refuses what the strategy cannot do, and calls :func:`.start.start`.

    Here are the calls, and what a strategy without anything to do in one of them does: nothing.
    """

    name: str
    """As the user gives it to :func:`commlab.strategy`."""
    training: Training
    """What the strategy works on, with its engine."""
    buckets: GradientBuckets
    """The gradients that commlab sends; without buckets where a library exchanges them."""
    role: str = "worker"
    """"server" on a rank that only served; the constructor has served all workers to their end then."""
    averages: bool = True
    """Whether the ranks' gradients of a step become one; under ssp and asp they do not."""
    keeps_gradients: bool = True
    """Whether ``p.grad`` holds the reduced gradient after a step."""
    shards_state: bool = False
    """Whether ranks hold different pieces of the optimizer's state; else every rank holds all of it."""
    edits: Edits
    """What the user does to parameters and gradients beside the engine."""
    drops_steps: bool = True
    """Whether a step whose gradients have left can still be dropped, when all ranks refuse to make it."""

    # A step.

    def no_sync(self) -> AbstractContextManager[None]:
        """Context for the forward and backward passes that only accumulate gradients on this rank."""
        return nullcontext()

    def backward(self, loss: torch.Tensor | None, retain_graph: bool) -> None:
        """Compute this rank's gradients of ``loss``; None on a rank without samples."""
        if loss is not None:
            loss.backward(retain_graph=retain_graph)

    @abstractmethod
    def launch(self, bucket: Bucket) -> Waitable:
        """Start the exchange of a packed bucket. All ranks launch their buckets in index order."""

    @abstractmethod
    def complete(self) -> None:
        """After the step's last backward, all buckets are under way: put the reduced gradient into ``p.grad``, or what
        says that it is not there."""

    @abstractmethod
    def reduced(self, scale: float) -> tuple[list[ReducedGradient], set[int]]:
        """After :meth:`complete`: the pieces of the reduced gradient, which is multiplied by ``scale`` here, that this
        rank can edit, and the parameters (by index) that have a gradient on no rank. Collective."""

    def forget(self) -> None:  # noqa: B027 - most strategies have put nothing there
        """The step is over, or was dropped: take away what :meth:`complete` has put there."""

    @abstractmethod
    def agree(self) -> Verdict:
        """What all ranks know of the step's reduced gradient, once the exchange of all buckets has ended. Collective:
        no rank updates anything before all ranks' gradients are complete."""

    @abstractmethod
    def update(self, factor: float, unused: set[int]) -> None:
        """Multiply the reduced gradient by ``factor`` (clipping, 1 / loss scale), and step the optimizer. ``unused``:
        parameters (by index) that had no gradient on any rank, which the optimizer must pass over."""

    def pull(self) -> None:  # noqa: B027 - most strategies have nothing to pull
        """Give every rank the updated parameters, where they were updated elsewhere. Also called after a step that was
        skipped."""

    # Between steps.

    def assignments(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(step, whose samples of that step), in the order in which this rank is to train on them, until the samples of
        steps ``start .. stop - 1`` are all given out."""
        yield from ((step, self.training.group.rank) for step in range(start, stop))

    def finish(self, last: bool) -> None:  # noqa: B027 - most strategies finish in every step
        """Make this rank's parameters the newest, in full precision. ``last``: this rank will train no more.
        Collective."""

    def update_parameters(self, change: Callable[[torch.nn.Module], object]) -> None:
        """Run ``change(model)``, which writes parameters and buffers in place, so that the change takes effect once on
        every copy of them: rank 0's is everybody's. Collective."""
        with torch.no_grad():
            change(self.training.model)
            copy_from_rank_0(self.training.group, tensors_of(self.training.model))
            self.training.masters.follow()

    def replicas(self) -> Iterator[tuple[str, Any]]:
        """The trained parameters, and what the optimizer remembers, of which every rank has a copy, by name, for an
        error."""
        yield from ((repr(item.name), item.tensor) for item in self.training.parameters)
        if self.shards_state:
            return
        for piece in self.training.masters.pieces:
            if piece.tensor is not piece.parameter.tensor:
                yield f"the fp32 master of {piece.parameter.name!r}", piece.tensor
            for key, value in self.training.optimizer.state.get(piece.tensor, {}).items():
                yield f"the optimizer's {key!r} of {piece.parameter.name!r}", value

    def compare_shards(self) -> None:  # noqa: B027 - most have every shard once
        """DisagreementError, on all ranks, where ranks that own the same shard have different ones. Collective."""

    @property
    def saves_state(self) -> bool:
        """Whether this rank's part of the state belongs into a checkpoint; else another rank has the same."""
        return self.shards_state or self.training.group.rank == 0

    @abstractmethod
    def replan(self, roster: Roster) -> None:
        """Train from now on what ``roster`` says, and keep what the optimizer remembers. Collective; all ranks have
        agreed on the change. AgreedError where the strategy can't."""

    def look_before_forward(self, look: Callable[[], None]) -> None:  # noqa: B027 - most need not
        """``look()`` finds changes, and calls :meth:`replan` for them. The engine calls it when a backward begins; a
        strategy that has to know sooner calls it sooner."""

    def owned(self) -> list[pieces.Piece]:
        """The pieces of parameters that this rank's optimizer updates."""
        return self.training.masters.pieces

    def state(self) -> dict[str, Any]:
        """What the optimizer remembers of what this rank owns, as :func:`commlab.checkpoint.pieces.state` has it."""
        training = self.training
        # A frozen parameter's state every rank has whole: one of them saves it.
        frozen = () if self.shards_state and training.group.rank else training.frozen
        return pieces.state(self.owned(), training.optimizer, frozen)

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """The reverse of :meth:`state`, from any ranks' states. UsageError where a range that this rank owns is in none
        of them; the optimizer is as it was then."""
        pieces.load(self.owned(), self.training.optimizer, states, self.training.frozen)

    @property
    def serving(self) -> str:
        """How parameters are served, in a line for the user; empty where no rank only serves."""
        return ""

    def serving_report(self) -> dict[str, str]:
        """What servers report at the end: rows of the trainer's summary. Collective."""
        return {}

    @abstractmethod
    def close(self, *, state: bool) -> None:
        """Take the hooks off the model, give shared memory back, and let model and optimizer be the user's again.
        ``state``: with all that the ranks' optimizers remember; else that is dropped where ranks have pieces of it.
        Collective."""
