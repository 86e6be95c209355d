"""commlab's own contestants, by its public calls: algorithms, wires, kinds of memory, agreement check on and off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

import commlab
from commlab.collectives.plan import pick
from commlab.native.dtypes import WIRES
from commlab.schedules import ALGORITHMS

from ..core.harness import Block, Contestant, missing
from .case import Case

NAMES = ("auto", "window", *ALGORITHMS)


class Groups(NamedTuple):
    """All ranks of a launch in two groups, and memory that both can use."""

    world: commlab.Group
    """The group that ``commlab.init`` made, with a window where there is one."""
    messages: commlab.Group
    """A group without a window, whose ranks send messages."""
    memory: torch.Tensor | None
    """Bytes of the window, as many as the largest case has; None without a window."""


def groups_of(world: commlab.Group, largest_bytes: int) -> Groups:
    """The groups of all ranks of ``world``. Collective."""
    messages = world.subgroup(range(world.size))
    assert messages is not None
    memory = None if world.window is None else commlab.empty(largest_bytes, torch.int8)
    return Groups(world, messages, memory)


def commlab_blocks(
    case: Case, groups: Groups, algorithms: Sequence[str], wires: Sequence[str | None], checks: Sequence[bool]
) -> list[Block]:
    """A block per combination. Only an allreduce of numbers wider than the wire has wires; only messages can do without
    the agreement check, which is compared on the first wire."""
    if case.op != "allreduce" or case.dtype not in (torch.float32, torch.float64):
        wires = [None]
    found = []
    for wire in wires:
        for algorithm in algorithms:
            if algorithm in ("auto", "window"):
                found += _on_the_node(case, groups, algorithm, wire)
            else:
                compared = checks if wire == wires[0] else checks[:1]
                found += [_block(case, groups.messages, algorithm, wire, check) for check in compared]
    return found


def _on_the_node(case: Case, groups: Groups, algorithm: str, wire: str | None) -> list[Block]:
    """``auto`` or ``window`` on an ordinary tensor, and ``window`` also on a tensor that lives in the window."""
    if algorithm == "window" and groups.world.window is None:
        return [missing("commlab window", groups.world.window_reason, kind="commlab", algorithm=algorithm, wire=wire)]
    found = [_block(case, groups.world, algorithm, wire)]
    if algorithm == "window" and groups.memory is not None and case.op != "reduce_scatter":
        # A reduce-scatter leaves its input alone, so it works on a copy wherever that lies.
        in_window = case.within(groups.memory[: case.bytes].view(case.dtype))
        found.append(_block(in_window, groups.world, algorithm, wire, memory="window"))
    return found


def _block(
    case: Case,
    group: commlab.Group,
    algorithm: str,
    wire: str | None,
    check: bool = True,
    memory: str = "ordinary",
) -> Block:
    labels = {"kind": "commlab", "algorithm": algorithm, "wire": wire, "check": check, "memory": memory}
    labels["transport"] = group.transport.name
    name = f"commlab {algorithm}"
    if algorithm == "auto":
        labels["chosen"] = _choice(case, group, wire)
        name += f" = {labels['chosen']}"
    name += (", in place there" if memory == "window" else "") + (f", wire {wire}" if wire else "")
    name += "" if check else ", no check"

    def start() -> None:
        group.agreement.required = check

    def stop() -> None:
        group.agreement.required = True

    result = case.chunk if case.op == "reduce_scatter" else case.whole
    work = partial(_result_of, _call(case, group, algorithm, wire), result)
    contestant = Contestant(name, work, case.fill, case.wrong, labels, bytes_sent=lambda: group.bytes_sent)
    return Block([contestant], start, stop)


def _call(case: Case, group: commlab.Group, algorithm: str, wire: str | None) -> Callable[[], object]:
    if case.op == "allreduce":
        return partial(commlab.allreduce, case.whole, "sum", algorithm=algorithm, wire=wire, group=group)
    if case.op == "reduce_scatter":
        return partial(commlab.reduce_scatter, case.chunk, case.whole, "sum", algorithm=algorithm, group=group)
    if case.op == "allgather":
        return partial(commlab.allgather, case.whole, case.chunk, algorithm=algorithm, group=group)
    return partial(commlab.broadcast, case.whole, 0, algorithm=algorithm, group=group)


def _result_of(call: Callable[[], object], result: torch.Tensor) -> torch.Tensor:
    call()
    return result


def _choice(case: Case, group: commlab.Group, wire: str | None) -> str:
    """The algorithm that ``auto`` stands for here."""
    return pick(group, case.op, "auto", case.bytes // case.dtype.itemsize, WIRES[wire] or case.dtype)[0]
