"""Strategies: how gradients become agreed updates. ``STRATEGIES`` is the table: a name, and the module and the class of
the strategy. Classes are loaded when asked for, so that a strategy whose library is missing disturbs no other."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from ..errors import UsageError
from .options import Options

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

    ``name``: single, ps, dps, allreduce, horovod, ddp. ``options``: the fields of
    :class:`commlab.strategies.options.Options`, which has also the rules of what goes together; they are checked before
    anything is built. ``optimizer``: the user's own; under ps and dps its ``params`` become the pieces that this rank
    owns, while groups, hyper-parameters and LR schedulers stay. With ``servers`` this returns on the ranks that serve
    when all others have closed their engines. Errors: UsageError.
    """
    from ..runtime.world import resolve
    from .engine import Engine

    unknown = sorted(set(options) - set(Options.__dataclass_fields__))
    if unknown:
        raise UsageError(
            f"unknown option {unknown[0]!r} for a strategy; there are {', '.join(Options.__dataclass_fields__)}"
        )
    chosen = Options(**options)
    members = resolve(group)
    chosen.check(name, members.size)
    if chosen.servers is not None:
        from .dedicated import Dedicated

        return Engine(Dedicated(name, model, optimizer, members, chosen))
    module, kind = STRATEGIES[name]
    built: Strategy = getattr(import_module(f".{module}", __name__), kind)(model, optimizer, members, chosen)
    return Engine(built)
