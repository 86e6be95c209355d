"""What an engine says to calls that come at the wrong time, and to what its user has done beside it that can't
count."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError


def closed_error(role: str, call: str) -> UsageError:
    """For ``call`` on an engine that trains no more; ``role``: the engine's."""
    if role == "server":
        return UsageError(f"{call} on a rank that has only served; there is nothing to call on its engine")
    return UsageError(
        f"{call} on an engine that was closed: model and optimizer are yours again; build another engine with "
        "commlab.strategy()"
    )


def driven_error(who: str) -> UsageError:
    """For a call of ``optimizer.step()`` that is not the engine's; ``who``: the engine."""
    return UsageError(
        f"optimizer.step() of an optimizer that {who} drives: gradients are agreed on in engine.step(), which steps "
        "the optimizer; call engine.step(), or engine.close() first"
    )


def closure_error() -> UsageError:
    """For a call of ``engine.step(closure)``."""
    return UsageError(
        "engine.step() takes no closure: gradients are computed by engine.backward(), once a step. An engine can't run "
        "an optimizer that evaluates the model again and again (LBFGS)"
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


def moved_text(rank: int, name: str, strategy: str) -> str:
    """For parameter ``name``, which no longer lies where ``strategy`` updates it, or is another one by now."""
    return (
        f"rank {rank}: parameter {name!r} was given other memory after commlab.strategy() (by model.to() or half(), "
        "share_memory() or sending the model to another process, load_state_dict(assign=True), p.data = ? or another "
        f"Parameter in its place), and strategy {strategy} updates it where it was; do that before, or with "
        "copy.deepcopy(model), and write values by engine.update_parameters()"
    )


def written_text(rank: int, names: Sequence[str], instead: str) -> str:
    """For parameters ``names``, which were written between two steps; ``instead``: why that can't count."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return (
        f"rank {rank}: parameter {names[0]!r}{more} was written between two steps, by something else than the engine; "
        f"{instead}. Write parameters by engine.update_parameters(lambda model: ...), which has the write count once, "
        "on all ranks"
    )


def piece_written_text(rank: int, name: str) -> str:
    """For what the optimizer has, and ``name`` says, where it was written outside of the optimizer's step."""
    return (
        f"rank {rank}: {name} was written outside of the optimizer's step, and other ranks may have computed with it "
        "before. Where an optimizer exchanges parameters (eval() and train() of schedule-free ones, the swap of SWA), "
        "call engine.settle() after it, on all ranks; write parameters yourself by "
        "engine.update_parameters(lambda model: ...), and not through p.data"
    )
