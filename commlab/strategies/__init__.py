"""Strategies: how gradients become agreed updates. ``STRATEGIES`` is the table: a name, and the module and the class of
the strategy. Classes are loaded when asked for, so that a strategy whose library is missing disturbs no other."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from ..errors import UsageError

if TYPE_CHECKING:
    import torch

    from ..runtime.group import Group
    from .engine import Engine
    from .protocol import Strategy

STRATEGIES: Final[dict[str, tuple[str, str]]] = {
    "single": ("external", "Single"),
    "ps": ("sharded", "SingleServer"),
    "dps": ("sharded", "ShardedServer"),
    "allreduce": ("allreduce", "AllReduce"),
    "horovod": ("horovod", "Horovod"),
    "ddp": ("ddp", "Ddp"),
}


def strategy(
    name: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Group | None = None,
    **options: Any,
) -> Engine:
    """Couple ``model`` and ``optimizer`` to the group's other ranks; returns the engine. Collective.

    ``name``: single, ps, dps, allreduce, horovod, ddp. ``options``: algorithm, precision, autocast, wire,
    max_grad_norm, bucket_bytes, overlap, elementwise, servers, consistency, overlap_pulls
    (:class:`commlab.strategies.options.Options`).
    ``optimizer``: the user's own; under ps and dps its ``params`` become the pieces that this rank owns, while groups,
    hyper-parameters and LR schedulers stay. With ``servers`` this returns on the ranks that serve when all others have
    closed their engines. Errors: UsageError.
    """
    from ..runtime.world import resolve
    from .engine import Engine
    from .options import Options

    if name not in STRATEGIES:
        raise UsageError(f"unknown strategy {name!r}; there are {', '.join(STRATEGIES)}")
    unknown = sorted(set(options) - set(Options.__dataclass_fields__))
    if unknown:
        raise UsageError(
            f"unknown option {unknown[0]!r} for a strategy; there are {', '.join(Options.__dataclass_fields__)}"
        )
    chosen = Options(**options)
    if chosen.servers is not None:
        if name not in ("ps", "dps"):
            raise UsageError(f"servers={chosen.servers} has no meaning for strategy {name}; use ps or dps")
        from .dedicated import Dedicated

        return Engine(Dedicated(name, model, optimizer, resolve(group), chosen))
    if chosen.consistency != "bsp":
        raise UsageError(
            f"consistency {chosen.consistency!r} needs servers of their own: give servers=1 (ps) or more (dps); where "
            "every rank trains and serves there is bsp"
        )
    module, kind = STRATEGIES[name]
    built: Strategy = getattr(import_module(f".{module}", __name__), kind)(model, optimizer, resolve(group), chosen)
    return Engine(built)
