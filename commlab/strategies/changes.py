"""What is trained may change in mid-training: layers are unfrozen and given to the optimizer, or frozen, renamed,
replaced. Where a look (:mod:`.structure`) has seen something, all ranks agree here on what is trained from now on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from ..checkpoint.pieces import Piece
from ..errors import AgreedError, UsageError
from ..gradients.parameters import Named, name_parameters, parameters_by_name, require_numbers
from ..runtime.control import gather_bytes
from ..runtime.group import Group
from .structure import Structure


class Roster(NamedTuple):
    """What is trained from now on, as all ranks know it."""

    named: Named
    members: list[list[torch.Tensor]]
    """The whole parameters of each of the optimizer's groups."""


class Planned(NamedTuple):
    """What was trained so far, and how the optimizer has it on this rank."""

    named: Named
    members: Sequence[Sequence[torch.Tensor]]
    """As :attr:`Roster.members`."""
    pieces: Sequence[Piece]
    """What this rank's optimizer updates."""
    partial: bool
    """Whether the model has trainable parameters that another engine trains."""

    @property
    def rebound(self) -> bool:
        """Whether the optimizer's groups hold something else than ``members``: pieces, masters, stand-ins."""
        held = {id(piece.tensor) for piece in self.pieces}
        return any(id(item.tensor) not in held for item in self.named.trained)


def find_change(
    group: Group, structure: Structure, planned: Planned, model: torch.nn.Module
) -> Callable[[], Roster] | None:
    """None where other things have changed than what is trained; else how all ranks agree on it, which is collective.
    That raises UsageError on every rank for what can't be trained, and DisagreementError on every rank, with the
    parameters' names and the ranks, where what has changed is not the same on all of them."""
    listed = _Listed(structure, planned)
    what = error = ""
    try:
        named = _named(model, listed.members, planned)
        alike = _described(named) == _described(planned.named) and _same(listed.members, planned.members)
        if alike:
            return None
    except UsageError as refused:
        error = str(refused)
    changes = structure.described() or "the optimizer's groups have other members"
    what = _shortened(f"{error} ({changes})" if error else changes)

    def agree() -> Roster:
        # Ranks on which nothing has changed are about to do something else: the name tells them what they lack.
        record = json.dumps({"error": error, "removed": listed.removed, "kept": listed.kept}).encode()
        records = [json.loads(each) for each in gather_bytes(group, record, f"parameters: {what}")]
        _raise_alike([each["error"] for each in records])
        _require_removed_alike(records)
        gone = {name for each in records for name in each["removed"]}
        names = {id(item.tensor): item.name for item in (*planned.named.trained, *planned.named.frozen)}
        members = [[tensor for tensor in entry if names.get(id(tensor)) not in gone] for entry in listed.members]
        failure, found = "", Named([], [])
        try:
            found = _named(model, members, planned)
        except UsageError as refused:
            failure = str(refused)
        shown = json.dumps({"error": failure, "trained": _described(found)}).encode()
        everyones = [json.loads(each) for each in gather_bytes(group, shown, "parameters that are trained from now on")]
        _raise_alike([each["error"] for each in everyones])
        _require_alike([each["trained"] for each in everyones])
        return Roster(found, members)

    return agree


class _Listed:
    """What the optimizer's groups hold now, in whole parameters."""

    def __init__(self, structure: Structure, planned: Planned):
        self.members: list[list[torch.Tensor]] = []
        """Of each group."""
        self.removed: list[str] = []
        """Parameters that this rank updates, at least a piece of them, and that somebody has taken out of a group."""
        self.kept: list[str] = []
        """Parameters that this rank updates, at least a piece of them, and that are still there."""
        groups = structure.optimizer.param_groups
        if not planned.rebound:
            self.members = [list(entry["params"]) for entry in groups]
            return
        whole_of = {id(piece.tensor): piece.parameter for piece in planned.pieces}
        mine = {id(item.tensor): item.name for item in whole_of.values()}
        stand_ins = {id(tensor) for tensor in structure.members} - whole_of.keys()
        listed: list[dict[int, torch.Tensor]] = []
        for entry in groups:
            wholes = [
                whole_of[id(tensor)].tensor if id(tensor) in whole_of else tensor
                for tensor in entry["params"]
                if id(tensor) not in stand_ins
            ]
            listed.append({id(tensor): tensor for tensor in wholes})
        anywhere = set(chain.from_iterable(listed))
        for entry, there in zip(groups, listed, strict=True):
            old = next((at for at, before in enumerate(structure.groups) if before is entry), None)
            kept: dict[int, torch.Tensor] = {}
            for tensor in () if old is None else planned.members[old]:
                # What other ranks update, and what is frozen, is not listed here, and still a member.
                if id(tensor) in there or (id(tensor) not in mine and id(tensor) not in anywhere):
                    kept[id(tensor)] = tensor
            self.members.append(list((kept | there).values()))
        self.kept = [name for key, name in mine.items() if key in anywhere]
        self.removed = [name for key, name in mine.items() if key not in anywhere]


def _named(model: torch.nn.Module, members: Sequence[Sequence[torch.Tensor]], planned: Planned) -> Named:
    require_numbers(model)
    twice = [tensor for tensor, count in Counter(map(id, chain.from_iterable(members))).items() if count > 1]
    if twice:
        names = [name for name, tensor in parameters_by_name(model) if id(tensor) in twice]
        raise UsageError(f"{', '.join(map(repr, names))}: in two groups of the optimizer; leave it in one of them")
    named = name_parameters(model, members, partial=planned.partial)
    if not named.trained:
        raise UsageError("no parameter of the optimizer requires a gradient any more, so there is nothing to train")
    return named


def _described(named: Named) -> list[list[Any]]:
    """What ranks must agree on, of each parameter: name, shape, dtype, group, whether it is trained."""
    return [
        [item.name, list(item.tensor.shape), str(item.tensor.dtype).removeprefix("torch."), item.group, trained]
        for trained, items in ((True, named.trained), (False, named.frozen))
        for item in items
    ]


def _same(a: Sequence[Sequence[torch.Tensor]], b: Sequence[Sequence[torch.Tensor]]) -> bool:
    return [list(map(id, entry)) for entry in a] == [list(map(id, entry)) for entry in b]


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _raise_alike(errors: Sequence[str]) -> None:
    texts = sorted(set(filter(None, errors)))
    if texts:
        ranks = [rank for rank, text in enumerate(errors) if text]
        where = "" if len(ranks) == len(errors) else f" (on ranks {', '.join(map(str, ranks))} of {len(errors)})"
        raise AgreedError("; ".join(texts) + where)


def _require_removed_alike(records: Sequence[Mapping[str, Any]]) -> None:
    for rank, record in enumerate(records):
        for name in record["removed"]:
            keeps = [other for other, each in enumerate(records) if name in each["kept"]]
            if keeps:
                raise AgreedError(
                    f"{name!r} was taken out of the optimizer on rank {rank}, and is still there on rank"
                    f"{'s' * (len(keeps) > 1)} {', '.join(map(str, keeps))}; change the optimizer on all ranks alike"
                )


def _require_alike(everyones: Sequence[Sequence[Sequence[Any]]]) -> None:
    """AgreedError that names the first parameter on which ranks differ."""
    for rank, described in enumerate(everyones):
        if described != everyones[0]:
            first, other = ({each[0]: each[1:] for each in all_of} for all_of in (everyones[0], described))
            name = next((name for name in (*first, *other) if first.get(name) != other.get(name)), "")
            if not name:
                raise AgreedError(f"ranks 0 and {rank} have registered the same parameters in another order")
            shown = [
                "absent" if of is None else f"{of[1]}{of[0]} in group {of[2]}{'' if of[3] else ', frozen'}"
                for of in (first.get(name), other.get(name))
            ]
            raise AgreedError(
                f"parameter {name!r} is {shown[0]} on rank 0 and {shown[1]} on rank {rank}; all ranks must train the "
                "same parameters, in the same groups"
            )
