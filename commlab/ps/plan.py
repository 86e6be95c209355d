"""What a rank makes of a store's arguments before anything is sent: all that can be refused is refused here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

import torch

from ..errors import UsageError
from ..native.dtypes import require_wire
from ..runtime.group import Group
from . import hypers
from .consistency import parse
from .elementwise import require_elementwise
from .messages import MESSAGE_BYTES
from .placement import server_ranks
from .server.ledger import Rules
from .server.shard import Factory, Shard
from .worker.keys import Keys

T = TypeVar("T")


class StorePlan(NamedTuple):
    """What a rank makes of its arguments, before anything is sent."""

    keys: Keys
    optimizer: torch.optim.Optimizer | None
    group_count: int
    rules: Rules
    ranks: tuple[int, ...]
    workers: list[int]
    alone: bool


def make_plan(
    everyone: Group,
    named_params: Iterable[tuple[str, torch.Tensor]],
    factory: Factory | None,
    groups: Mapping[str, int],
    elementwise: bool | None,
    consistency_name: str,
    servers: int | None,
    wire: str | None,
    max_grad_norm: float | None,
    skips: bool,
) -> StorePlan:
    """The arguments of :class:`commlab.ParameterServer`, checked. UsageError for what can't be."""
    consistency = parse(consistency_name)
    require_wire(wire)
    if max_grad_norm is not None:
        if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, (int, float)) or not max_grad_norm > 0:
            raise UsageError(f"max_grad_norm is {max_grad_norm!r}; give a number above 0, or None")
        consistency.require_lockstep(f"max_grad_norm {max_grad_norm}")
    elif skips:
        consistency.require_lockstep("skipping what is not finite")
    if servers is not None and type(servers) is not int:
        raise UsageError(f"servers is {servers!r}; give the number of ranks that serve")
    alone = everyone.size == 1 and servers is None
    ranks = (1,) if alone else server_ranks(everyone.nodes, 1 if servers is None else servers)
    keys = Keys(named_params, groups, len(ranks), everyone.rank)
    group_count = 1 + max((entry.group for entry in keys.placement.entries), default=0)
    optimizer = None
    if factory is not None:
        if not callable(factory):
            raise UsageError(
                f"optimizer is a {type(factory).__name__}; give a factory: lambda params: SGD(params, lr=0.1)"
            )
        with on_the_cpu():
            optimizer = _made(lambda: _example(factory, group_count, elementwise), f"rank {everyone.rank}")
        hypers.encode(optimizer, len(optimizer.param_groups))
    agrees = max_grad_norm is not None or skips
    workers = [rank for rank in range(max(2, everyone.size)) if rank not in ranks]
    rules = Rules(consistency, len(workers), len(ranks), agrees, skips, max_grad_norm)
    return StorePlan(keys, optimizer, group_count, rules, ranks, workers, alone)


def make_shard(everyone: Group, plan: StorePlan, index: int, factory: Factory | None) -> Shard:
    """The shard of server ``index``. UsageError for what the factory raises."""
    with on_the_cpu():
        where = f"server {index} (rank {everyone.rank})"
        return _made(lambda: Shard(plan.keys.placement, index, factory, plan.group_count), where)


def _made(make: Callable[[], T], where: str) -> T:
    """``make()``, which calls the user's factory; what it raises is a UsageError."""
    try:
        return make()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{where}: the optimizer's factory raised {type(error).__name__}: {error}") from error


def on_the_cpu() -> AbstractContextManager[object]:
    """Servers work on the CPU, also where torch makes tensors elsewhere by default."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _example(factory: Factory, groups: int, elementwise: bool | None) -> torch.optim.Optimizer:
    """The factory's optimizer on numbers that nobody uses, for its kind and its hyper-parameters. Made on every rank,
    so that all ranks refuse an optimizer that servers can't run."""
    stand_ins = [torch.zeros(1, device="cpu") for _ in range(groups)]
    made = factory(stand_ins if groups == 1 else [{"params": [stand_in]} for stand_in in stand_ins])
    if not isinstance(made, torch.optim.Optimizer):
        raise UsageError(f"the optimizer's factory returned a {type(made).__name__}, which is no torch.optim.Optimizer")
    held = {id(tensor) for entry in made.param_groups for tensor in entry["params"]}
    if held != set(map(id, stand_ins)):
        raise UsageError(
            f"the optimizer's factory made {type(made).__name__} of other tensors than those that it was given, or not"
            " of all of them; let it pass them on: lambda params: SGD(params, lr=0.1)"
        )
    require_elementwise(made, elementwise)
    return made


def side_by_side(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """``tensors`` in flat ones of one dtype each, on the CPU: many small ones, or one big one."""
    names: list[str] = []
    nbytes = 0
    for name, tensor in tensors.items():
        if names and (tensor.dtype != tensors[names[0]].dtype or nbytes + tensor.nbytes > MESSAGE_BYTES):
            yield tuple(names), torch.cat([tensors[each].detach().reshape(-1).cpu() for each in names])
            names, nbytes = [], 0
        names.append(name)
        nbytes += tensor.nbytes
    if names:
        yield tuple(names), torch.cat([tensors[each].detach().reshape(-1).cpu() for each in names])
