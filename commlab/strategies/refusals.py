"""What an engine says to calls that come at the wrong time."""

from __future__ import annotations

from ..errors import UsageError


def closed_error(role: str, call: str) -> UsageError:
    """For ``call`` on an engine that trains no more; ``role``: the engine's."""
    if role == "server":
        return UsageError(f"{call} on a rank that has only served; there is nothing to call on its engine")
    return UsageError(
        f"{call} on an engine that was closed: model and optimizer are yours again; build another engine with "
        "commlab.strategy()"
    )


def gradients_left_error(name: str, *, stale: bool) -> UsageError:
    """For backward() where parameter ``name`` has a gradient that no backward() of this step has left. ``stale``:
    whether the last step's gradients may still be there."""
    if stale:
        return UsageError("gradients of the last step are still there: call engine.zero_grad() after engine.step()")
    return UsageError(
        f"parameter {name!r} has a gradient already, from another backward pass than this engine's (another engine's, "
        "which went through this model, or loss.backward()): call engine.zero_grad() before engine.backward(); run it "
        "inside engine.no_sync() where it is to count"
    )
