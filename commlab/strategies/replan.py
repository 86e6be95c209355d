"""What an engine does where its user has changed what is trained: all ranks agree on the change, and the strategy plans
anew."""

from __future__ import annotations

from ..errors import AgreedError, UsageError
from .changes import find_change
from .protocol import Strategy
from .start import Training


def take_in_changes(strategy: Strategy, *, within_step: bool, closing: bool = False) -> bool:
    """Find out what is trained from now on, and plan anew where that is something else; returns whether it is.
    Collective where it is. ``within_step``: a step is under way, which must not lose what its gradients are of:
    UsageError then. ``closing``: the engine trains no more, and a strategy that can't plan anew need not."""
    training = strategy.training
    structure = training.structure
    if structure.same():
        return False
    agree = find_change(training.group, structure, training.planned, training.model)
    if agree is not None:
        if within_step and not closing:
            raise UsageError(
                f"rank {training.group.rank}: {structure.described()} within a step; change what is trained "
                "after engine.step(), before the next step's first backward()"
            )
        before = strategy.buckets
        try:
            roster = agree()
            if closing:
                training.members = roster.members
            if not within_step:
                strategy.replan(roster)
        except AgreedError:
            if not closing:
                raise
        # A step may have begun inside no_sync.
        strategy.buckets.listening = False
        strategy.buckets.syncing, strategy.buckets.overlap = before.syncing, before.overlap
    structure.look()
    return agree is not None


def require_planned(training: Training, call: str) -> None:
    """For calls that are not collective: UsageError where ranks have still to agree on what is trained."""
    structure = training.structure
    if structure.same() or find_change(training.group, structure, training.planned, training.model) is None:
        return
    raise UsageError(
        f"rank {training.group.rank}: {call} before all ranks have taken in that {structure.described()}; call "
        "engine.settle() on all of them first"
    )
